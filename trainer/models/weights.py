"""Load the initial weights of a backbone: ImageNet weights, the packaged file, another file, or random values."""

import os
import zipfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

from trainer.config.model import WEIGHTS_SUFFIXES
from trainer.config.typed import format_argument
from trainer.errors import ModelError, TrainerError
from trainer.models.backbones import BackboneSpec
from trainer.storage.disk import translate_disk_error
from trainer.storage.download import translate_download_error

# Weights in this package: MobileNetV2 with alpha 0.35, pretrained on rendered letters.
GLYPHS_WEIGHTS = Path(__file__).parent / "weights" / "glyphs_mobilenet_v2_0.35.weights.h5"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # red, green, blue, for pixels in 0..1
ALPHAS = (0.25, 0.35, 0.5, 0.75, 1.0, 1.3, 1.4)  # width multipliers with published weights


def build_with_weights(
    spec: BackboneSpec, image_size: int, alpha: float | None, weights: str, seed: int
) -> keras.Model:
    """Build a backbone with its initial weights.

    Args:
        weights: "imagenet"; "glyphs", the packaged file; "none", random values that depend only on `seed`; or the local
            path of a Keras file, or of a folder that `trainer.prepare weights=...` wrote.
        seed: seed of Python's global random generator, from which Keras draws the seeds of its initializers. Nothing
            else in a run uses that generator.

    Raises:
        ModelError: the backbone cannot be built, the weights cannot be loaded, or they do not fit the backbone.
        Interrupted: ImageNet weights cannot be downloaded, because of the network or a full disk.
    """
    keras.utils.set_random_seed(seed)
    if weights == "imagenet":
        return _download(spec, image_size, alpha)
    path = find_weights_file(spec, image_size, alpha, weights)  # checked first: building the network takes seconds
    if path is None:
        return spec.build(image_size, alpha, None)
    network = spec.build(image_size, alpha, None)
    # In the older HDF5 format, which published ImageNet files have, Keras itself checks the shapes.
    if path.suffix == ".keras" or path.name.endswith(".weights.h5"):
        _check_shapes(network, path, spec, image_size, alpha)
    try:
        network.load_weights(path)
    except (ValueError, KeyError, OSError) as error:
        # Report only Keras' sentence about the first object that does not fit, not its list of all objects.
        lines = [line for line in str(error).splitlines() if line.strip()]
        detail = lines[1] if len(lines) > 1 and lines[0].startswith("A total of") else lines[0]
        raise _make_mismatch_error(path, spec, alpha, detail.strip()) from error
    if spec.module == "efficientnet":
        _set_published_variance(network)
    return network


def find_weights_file(spec: BackboneSpec, image_size: int, alpha: float | None, weights: str) -> Path | None:
    """Return the local file of `weights`, an argument of `build_with_weights`; None for "imagenet" and "none".

    Raises:
        ModelError: the file is missing, corrupt or not in a Keras format, or "glyphs" does not fit the backbone.
    """
    if weights in ("imagenet", "none"):
        return None
    path = Path(weights).expanduser()
    if weights == "glyphs":
        path = GLYPHS_WEIGHTS
        if (spec.name, alpha) != ("MobileNetV2", 0.35):
            problem, fix = f"does not fit {_format_name(spec, alpha)}", "use model=glyphs_mobilenet_v2"
            raise ModelError(problem, key="model.weights", value=weights, fix=fix)
        if not path.is_file():
            problem, fix = f"the packaged file {path.name} is missing", "run `make pretrained`"
            raise ModelError(problem, key="model.weights", value=weights, fix=fix)
    if path.is_dir() and not _suggest_warm_start(path):
        name = spec.name_weights_file(image_size, alpha)
        if not (path / name).is_file():
            raise make_missing_error(path, spec, name, alpha)
        path /= name
    _check_file(path)
    return path


def _set_published_variance(network: keras.Model) -> None:
    """Correct the variance in the input normalization of an EfficientNet B0 to B7, so that it fits published weights.

    Published weights expect (x - mean) / std^1.5. Keras builds this as Normalization (/ std) plus Rescaling
    (/ sqrt(std)), but adds the second layer only with `weights="imagenet"` (tensorflow#49930). Without the second
    layer, the variance std^3 gives the same result. Means and variances other than ImageNet's are not changed.
    """
    index, layer = next((i, x) for i, x in enumerate(network.layers) if isinstance(x, keras.layers.Normalization))
    mean, variance = (keras.ops.convert_to_numpy(tensor).ravel() for tensor in (layer.mean, layer.variance))
    wrong_variance, right_variance = np.square(IMAGENET_STD), np.power(IMAGENET_STD, 3)
    if isinstance(network.layers[index + 1], keras.layers.Rescaling):
        wrong_variance, right_variance = right_variance, wrong_variance
    if np.allclose(mean, IMAGENET_MEAN, atol=1e-3) and np.allclose(variance, wrong_variance, atol=1e-3):
        layer.adapt_variance.assign(right_variance)
        layer.finalize_state()


def refresh_normalization(network: keras.Model) -> None:
    """Update the input normalization of a network after values were assigned to its variables.

    A Normalization layer computes with constants, which Keras derives from the variables only when it loads a file.
    Networks without a Normalization layer that has variables are not changed.
    """
    for layer in network.layers:
        if isinstance(layer, keras.layers.Normalization) and layer.input_mean is None:
            layer.finalize_state()
            _set_published_variance(network)


def _download(spec: BackboneSpec, image_size: int, alpha: float | None) -> keras.Model:
    """Build a backbone with ImageNet weights, which Keras downloads unless they are cached.

    With `weights="imagenet"`, Keras builds an EfficientNet with an additional layer (see `_set_published_variance`).
    The EfficientNet is rebuilt without this layer, so that a plan, which downloads nothing, counts the same layers.
    """
    try:
        network = spec.build(image_size, alpha, "imagenet")
    except Exception as error:  # keras.utils.get_file raises a bare Exception if it cannot connect
        translated_error = make_download_error(spec, error)
        if translated_error is error:
            raise
        raise translated_error from error
    if spec.module != "efficientnet":
        return network
    rebuilt = spec.build(image_size, alpha, None)
    rebuilt.set_weights(network.get_weights())
    refresh_normalization(rebuilt)
    return rebuilt


def make_download_error(spec: BackboneSpec, error: Exception) -> TrainerError:
    """Translate an exception of `BackboneSpec.build`, or of a download of ImageNet weights, for the user.

    Returns:
        Interrupted if the network, the server or the disk failed; `error` itself if it is another ModelError of the
        build; otherwise a ModelError, such as for an address that the server refuses.
    """
    problem = f"the weights of {spec.name} could not be downloaded"
    fix = "use the path of a .weights.h5 file or of a folder that `trainer.prepare weights=...` wrote, or none"
    # For an incomplete file, Keras raises a ValueError, which `build` translates into a ModelError.
    cause = error.__cause__ if isinstance(error, ModelError) else error
    if cause and (failure := translate_download_error(cause, problem, key="model.weights", value="imagenet", fix=fix)):
        return failure
    if isinstance(error, ModelError):
        return error
    if disk_error := translate_disk_error(error, [os.environ.get("KERAS_HOME", "~/.keras")]):
        return disk_error
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ModelError(f"{problem} ({reason})", key="model.weights", value="imagenet", fix=fix)


def make_missing_error(folder: str | Path, spec: BackboneSpec, name: str, alpha: float | None) -> ModelError:
    """Make the error for a weights folder that lacks `name`, the file of a backbone with width multiplier `alpha`."""
    argument = spec.name + (f":{alpha:g}" if alpha else "")
    command = f"python -m trainer.prepare weights=[{argument}] {format_argument('output', folder)}"
    problem = f"is a folder without {name}, the weights of {_format_name(spec, alpha)}"
    fix = f"write them with {command}, or use imagenet, glyphs, none, or the path of a file"
    return ModelError(problem, key="model.weights", value=folder, fix=fix)


def _format_name(spec: BackboneSpec, alpha: float | None) -> str:
    """Return the backbone's name for messages, with its width multiplier if it takes one."""
    return spec.name + (f" with alpha {alpha or 1.0:g}" if spec.takes_alpha else "")


def _make_mismatch_error(
    path: Path, spec: BackboneSpec, alpha: float | None, detail: str, fix: str | None = None
) -> ModelError:
    """Build the error for a weights file that does not fit the backbone. `detail` is the reason."""
    problem = f"does not fit {_format_name(spec, alpha)} without its top: {detail}"
    return ModelError(problem, key="model.weights", value=path,
                      fix=fix or _suggest_warm_start(path) or f"use weights of {spec.name}")  # fmt: skip


def _suggest_warm_start(path: Path) -> str | None:
    """Return the advice to use `warm_start` if `path` is in the output_dir of a run, or is that folder; else None."""
    for folder in (path, *path.absolute().parents[:3]):
        if (folder / "config.yaml").is_file() and (folder / "run.json").is_file():
            return f"set {format_argument('warm_start', folder)} to begin with all weights of this run"
    return None


def _check_file(path: Path) -> None:
    """Raise a ModelError unless the path is a file in a Keras format, judged by its suffix and first bytes."""
    if not path.is_file() or path.suffix not in WEIGHTS_SUFFIXES:
        reason = "is a folder" if path.is_dir() else "is not a Keras file" if path.is_file() else "does not exist"
        fix = "use imagenet, glyphs, none, or the path of a .weights.h5, .h5 or .keras file"
        raise ModelError(reason, key="model.weights", value=path, fix=_suggest_warm_start(path) or fix)
    if not (zipfile.is_zipfile(path) if path.suffix == ".keras" else h5py.is_hdf5(path)):
        raise _make_corrupt_error(path, "possibly a Git LFS pointer")


def _make_corrupt_error(path: Path, reason: object) -> ModelError:
    """Build the error for a weights file that cannot be read."""
    problem = f"is not a Keras weights file or is corrupt ({reason})"
    return ModelError(problem, key="model.weights", value=path, fix="replace the file")


def _count_shapes_in_file(path: Path) -> Counter[tuple[int, ...]]:
    """Return the number of arrays of each shape in a Keras 3 file, except the states of optimizer and generators.

    Raises:
        ModelError: the file is corrupt.
    """
    shapes: Counter[tuple[int, ...]] = Counter()

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset) and "seed_generator" not in name and not name.startswith("optimizer"):
            shapes[item.shape] += 1

    try:
        with ExitStack() as stack:
            file: Any = path
            if path.suffix == ".keras":
                file = stack.enter_context(stack.enter_context(zipfile.ZipFile(path)).open("model.weights.h5"))
            stack.enter_context(h5py.File(file)).visititems(visit)
    except (OSError, KeyError, RuntimeError) as error:
        raise _make_corrupt_error(path, error) from error
    return shapes


def _count_shapes(network: keras.Model) -> Counter[tuple[int, ...]]:
    """Return the number of variables of each shape in a network."""
    return Counter(tuple(variable.shape) for variable in network.weights)


def _check_shapes(network: keras.Model, path: Path, spec: BackboneSpec, image_size: int, alpha: float | None) -> None:
    """Raise a ModelError unless the file and the network have the same number of arrays of each shape.

    Keras would ignore additional arrays in the file. If the file fits another published alpha, the error suggests it.
    """
    actual, expected = _count_shapes_in_file(path), _count_shapes(network)
    if actual == expected:
        return
    for other in [a for a in ALPHAS if a != (alpha or 1.0)] if spec.takes_alpha else []:
        if _count_shapes(spec.build(image_size, other, None)) == actual:
            raise _make_mismatch_error(path, spec, alpha, f"it is for alpha {other:g}", f"set model.alpha={other:g}")
    detail = f"the file has {sum(actual.values())} arrays, the backbone {sum(expected.values())}"
    if missing := expected - actual:
        shape = max(missing, key=lambda s: (len(s), s))
        detail += f", and the file has {actual[shape]} of shape {list(shape)}, the backbone {expected[shape]}"
    raise _make_mismatch_error(path, spec, alpha, detail)
