"""A folder of published weights, local or in a bucket, for clusters without internet access.

`python -m trainer.prepare weights=[mobilenet_v2:0.35,...] output=FOLDER` writes the folder. With
`model.weights=FOLDER`, a run reads the file of its backbone from the folder.
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
    """If `model.weights` is a folder in a bucket, replace it by the file of the backbone, so that only that is copied.

    Returns:
        The changed settings, or `model` itself if `weights` is anything else, or if the backbone is auto, and the file
        is therefore not known yet.

    Raises:
        ModelError: the folder does not contain the file.
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
    """Describe for a plan where a run would get the weights of its backbone from. Nothing is downloaded.

    Raises:
        TrainerError: the run would end with this error, such as a missing file or an unreachable server.
    """
    if model.weights == "imagenet":
        return _check_download(model)
    weights = locate_weights(model).weights
    if is_remote(weights):
        return f"{weights}: {storage_path(weights).size() / 1e6:,.1f} MB"
    return weights


def _check_download(model: Model) -> str:
    """Describe the source of the ImageNet weights: Keras, its cache or a URL, for which the size is requested.

    Raises:
        TrainerError: the request failed. A run would end with this error.
    """
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
    except Exception as error:  # keras.utils.get_file would raise it in the run
        raise make_download_error(spec, error) from error
    return f"imagenet: the run would download {size / 1e6:,.1f} MB from {url}"


def prepare_weights(
    chosen: Sequence[tuple[BackboneSpec, float | None]], output: str, log_message: LogMessage
) -> list[str]:
    """Write the ImageNet weights of backbones to a folder, one file per image size with separate weights.

    Files that exist are not written again.

    Args:
        chosen: backbones with their width multiplier; None if a backbone has none, or for 1.
        output: folder, local or in a bucket.
        log_message: called with a line per file.

    Returns:
        The names of all files, including those that existed.

    Raises:
        Interrupted: weights cannot be downloaded, the disk is full, or the bucket does not respond.
        ModelError: a backbone has no weights for this alpha, or the server refuses the download.
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
