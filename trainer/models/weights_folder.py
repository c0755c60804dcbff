"""A folder of published weights, local or in a bucket, from which a cluster without internet trains.

`python -m trainer.prepare weights=[mobilenet_v2:0.35,...] output=FOLDER` writes it; `model.weights=FOLDER` reads the
file of the configured network in it.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from trainer.config.schema import Model
from trainer.models.backbones import BackboneSpec, find_backbone
from trainer.models.weights import build_with_weights, make_download_error, make_missing_error
from trainer.private_api import find_download
from trainer.storage.download import request_size
from trainer.storage.path import storage_path
from trainer.storage.staging import is_remote
from trainer.types import LogMessage


def locate_weights(model: Model) -> Model:
    """Return the settings with the file of the network instead of a folder of weights in a bucket.

    So only that file is copied. With `backbone: auto` the network is not known yet, and the folder remains.

    Raises:
        ModelError: the folder does not have the file.
    """
    if not (is_remote(model.weights) and model.has_weights_folder) or model.backbone == "auto":
        return model
    spec = find_backbone(model.backbone)
    name = spec.name_weights_file(model.image_size or spec.default_size, model.alpha)
    file = storage_path(model.weights.rstrip("/")) / name
    if not file.exists():
        raise make_missing_error(model.weights, spec, name, model.alpha)
    return model.model_copy(update={"weights": str(file)})


def describe_weights(model: Model) -> str:
    """Describe where a run gets the weights of a backbone from, without downloading them.

    Raises:
        TrainerError: the run would end with this error.
    """
    if model.weights == "imagenet":
        return _check_download(model)
    located = locate_weights(model).weights
    if is_remote(located):
        return f"{located}: {storage_path(located).size() / 1e6:,.1f} MB"
    return located


def _check_download(model: Model) -> str:
    """Return the path or URL of the ImageNet weights; raise the error of a run if their server cannot be reached."""
    spec = find_backbone(model.backbone)
    download = find_download(lambda: spec.build(model.image_size or spec.default_size, model.alpha, "imagenet"))
    if download is None:
        return "imagenet: part of Keras"
    name, url = download
    cached = Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser() / "models" / name
    if cached.is_file():
        return f"imagenet: {cached}"
    try:
        size = request_size(url)
    except Exception as error:  # those of keras.utils.get_file, with which the run would end
        raise make_download_error(spec, error) from error
    return f"imagenet: the run would download {size / 1e6:,.1f} MB from {url}"


def prepare_weights(
    chosen: Sequence[tuple[BackboneSpec, float | None]], output: str, log_message: LogMessage
) -> list[str]:
    """Write the ImageNet weights of backbones to a folder; return the names of their files. Existing files remain.

    Raises:
        Interrupted: weights cannot be downloaded, or the bucket does not respond.
        ModelError: a backbone has no weights of this alpha.
    """
    folder, names = storage_path(output.rstrip("/")), []
    for spec, alpha in chosen:
        for size in spec.weight_sizes or (spec.default_size,):
            name = spec.name_weights_file(size, alpha)
            names.append(name)
            if (folder / name).exists():
                log_message(f"{folder / name} exists")
                continue
            network = build_with_weights(spec, size, alpha, "imagenet", seed=0)
            with tempfile.TemporaryDirectory() as scratch:
                file = Path(scratch) / name
                network.save_weights(file)
                (folder / name).upload(file)
                log_message(f"{folder / name}: {file.stat().st_size / 1e6:,.1f} MB")
    return names
