"""A folder of published weights, local or in a bucket, for clusters without internet access.

`python -m trainer.prepare weights=[mobilenet_v2:0.35,...] output=FOLDER` writes the folder. With
`model.weights=FOLDER`, a run reads its backbone's file from the folder.
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
    """If `model.weights` is a folder in a bucket, replace it with the backbone's file, so that only this is copied.

    Returns:
        The changed settings, or `model` itself if `weights` is not a folder in a bucket, or if the backbone is auto, so
        that its file is not known yet.

    Raises:
        ModelError: the folder does not contain the backbone's file.
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
    """Describe in one line where a run would get its backbone's weights from. Nothing is downloaded.

    Raises:
        TrainerError: a file is missing, or a server or bucket does not respond. A run would end with the same error.
    """
    if model.weights == "imagenet":
        return _check_download(model)
    weights = locate_weights(model).weights
    if is_remote(weights):
        return f"{weights}: {storage_path(weights).size() / 1e6:,.1f} MB"
    return weights


def _check_download(model: Model) -> str:
    """Describe the source of the ImageNet weights: Keras itself, its cache, or a URL and the size of its file.

    Raises:
        TrainerError: the request for the size failed. A run would end with the same error.
    """
    spec = find_backbone(model.backbone)
    download = find_download(lambda: spec.build(model.image_size or spec.default_size, model.alpha, "imagenet"))
    if download is None:
        return "imagenet: part of Keras"
    name, url = download
    cached_file = Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser() / "models" / name
    if cached_file.is_file():
        return f"imagenet: {cached_file}"
    try:
        size = request_size(url)
    except Exception as error:  # keras.utils.get_file would raise it in the run
        raise make_download_error(spec, error) from error
    return f"imagenet: the run would download {size / 1e6:,.1f} MB from {url}"


def prepare_weights(
    backbones: Sequence[tuple[BackboneSpec, float | None]], output: str, log_message: LogMessage
) -> list[str]:
    """Write the ImageNet weights of backbones to a folder, one file per image size with separate weights.

    Existing files are not written again.

    Args:
        backbones: pairs of backbone and width multiplier; None means 1, or that the backbone has no multiplier.
        output: folder, local or in a bucket.
        log_message: called with one line per file.

    Returns:
        The names of all files, including existing ones.

    Raises:
        Interrupted: weights cannot be downloaded, the disk is full, or the bucket does not respond.
        ModelError: a backbone has no weights for this alpha, or the server refuses the download.
    """
    folder = storage_path(output.rstrip("/"))
    names = []
    for spec, alpha in backbones:
        for size in spec.weight_sizes or (spec.default_size,):
            name = spec.name_weights_file(size, alpha)
            names.append(name)
            if (folder / name).exists():
                log_message(f"{folder / name} exists")
                continue
            network = build_with_weights(spec, size, alpha, "imagenet", seed=0)
            with tempfile.TemporaryDirectory() as temporary_dir:
                file = Path(temporary_dir) / name
                network.save_weights(file)
                (folder / name).upload(file)
                log_message(f"{folder / name}: {file.stat().st_size / 1e6:,.1f} MB")
    return names
