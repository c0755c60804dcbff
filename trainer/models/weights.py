"""The first values of a backbone: ImageNet's, the packaged ones, those of a file, or random ones."""

import zipfile
from collections import Counter
from pathlib import Path

import h5py
import keras
import numpy as np

from trainer.errors import ModelError
from trainer.models.backbones import Backbone

GLYPHS = Path(__file__).parent / "weights" / "glyphs_mobilenet_v2_0.35.weights.h5"
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of red, green, blue in 0..1
ALPHAS = (0.25, 0.35, 0.5, 0.75, 1.0, 1.3, 1.4)  # those that Keras publishes weights for


def build_with_weights(
    backbone: Backbone, image_size: int, alpha: float | None, weights: str, seed: int
) -> keras.Model:
    """A backbone that holds `weights`: imagenet, glyphs, none, or the path of a Keras file.

    With `none` every value is a function of `seed`. Keras draws the seeds of its initializers from Python's global
    generator, so this sets the global seeds (nothing else in a run draws from them).

    Raises:
        ModelError: the weights cannot be had, or do not fit the backbone.
    """
    keras.utils.set_random_seed(seed)
    if weights == "imagenet":
        return _download(backbone, image_size, alpha)
    if weights == "none":
        return backbone.build(image_size, alpha, None)
    path = Path(weights).expanduser()
    if weights == "glyphs":
        path = GLYPHS
        if (backbone.name, alpha) != ("MobileNetV2", 0.35):
            raise ModelError(
                "model.weights=glyphs fits model.backbone=MobileNetV2 with model.alpha=0.35 only, not "
                + _with_width(backbone, alpha)
            )
        if not path.is_file():
            raise ModelError(
                f"model.weights=glyphs: the packaged file {path.name} is missing; `make pretrained` makes it"
            )
    _check_file(path)  # before the seconds that building takes
    network = backbone.build(image_size, alpha, None)
    _load(network, path, backbone, image_size, alpha)
    if backbone.module == "efficientnet":
        _divide_as_published(network)
    return network


def _divide_as_published(network: keras.Model) -> None:
    """Give an EfficientNet (B0 to B7) with ImageNet's values, of a file or another run, the input that these were
    trained with.

    They were trained on (x - mean) / variance. Keras builds a layer that divides a second time by the root of the
    deviation for `weights="imagenet"` alone (tensorflow#49930). Where it is missing, the variance of the Normalization
    takes that factor in. Values that were not made from ImageNet's have another mean or variance.
    """
    index, norm = next((i, one) for i, one in enumerate(network.layers) if isinstance(one, keras.layers.Normalization))
    mean, variance = (keras.ops.convert_to_numpy(tensor).ravel() for tensor in (norm.mean, norm.variance))
    other, wanted = np.square(IMAGENET_DEVIATION), np.power(IMAGENET_DEVIATION, 3)
    if isinstance(network.layers[index + 1], keras.layers.Rescaling):
        other, wanted = wanted, other
    if np.allclose(mean, IMAGENET_MEAN, atol=1e-3) and np.allclose(variance, other, atol=1e-3):
        norm.adapt_variance.assign(wanted)
        norm.finalize_state()


def settle_input(network: keras.Model) -> None:
    """Make the input layers of a network compute with the values that were just assigned to its variables.

    A Normalization computes with constants that it made of its variables when they were loaded, and a network that
    Keras built for `weights="imagenet"` divided a second time (`_divide_as_published`).
    """
    for layer in network.layers:
        if isinstance(layer, keras.layers.Normalization) and layer.input_mean is None:
            layer.finalize_state()
            _divide_as_published(network)


def _download(backbone: Backbone, image_size: int, alpha: float | None) -> keras.Model:
    try:
        return backbone.build(image_size, alpha, "imagenet")
    except ModelError:
        raise
    except Exception as error:  # get_file raises a bare Exception when the network is away
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"model.weights=imagenet: the weights of {backbone.name} could not be downloaded ({reason}). Give a file "
            "with model.weights=/path/to/file.weights.h5, or start from random values with model.weights=none"
        ) from error


def _load(network: keras.Model, path: Path, backbone: Backbone, image_size: int, alpha: float | None) -> None:
    # The older HDF5 layout, which the published ImageNet files have, Keras checks itself.
    if path.suffix == ".keras" or path.name.endswith(".weights.h5"):
        _check_sizes(network, path, backbone, image_size, alpha)
    try:
        network.load_weights(path)
    except (ValueError, KeyError, OSError) as error:
        # Keras' own sentence about the first object that does not fit, without its lists.
        reasons = [line for line in str(error).splitlines() if line.strip()]
        detail = reasons[1] if len(reasons) > 1 and reasons[0].startswith("A total of") else reasons[0]
        raise ModelError(_misfit(path, backbone, alpha, detail.strip())) from error


def _with_width(backbone: Backbone, alpha: float | None) -> str:
    return backbone.name + (f" with alpha {alpha or 1.0:g}" if backbone.takes_alpha else "")


def _misfit(path: Path, backbone: Backbone, alpha: float | None, detail: str) -> str:
    return f"model.weights={path} does not fit {_with_width(backbone, alpha)} without its top: {detail}"


def _check_file(path: Path) -> None:
    if not path.is_file():
        where = "is a folder" if path.is_dir() else "does not exist"
        raise ModelError(
            f"model.weights={path} {where}: give imagenet, glyphs, none, or the path of a .weights.h5 or .keras file"
        )
    if path.suffix == ".keras":
        readable = zipfile.is_zipfile(path)
    elif path.suffix in (".h5", ".hdf5"):
        readable = h5py.is_hdf5(path)
    else:
        raise ModelError(f"model.weights={path}: the name must end in .weights.h5, .h5 or .keras")
    if not readable:
        raise ModelError(f"model.weights={path} is not a Keras weights file (damaged, or only a pointer to one?)")


def _parameters_by_shape(path: Path) -> Counter[tuple[int, ...]]:
    """Number of arrays of each shape in a Keras 3 file, the states of random generators left out."""
    shapes: Counter[tuple[int, ...]] = Counter()

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset) and "seed_generator" not in name and not name.startswith("optimizer"):
            shapes[item.shape] += 1

    try:
        if path.suffix == ".keras":
            with zipfile.ZipFile(path) as archive, archive.open("model.weights.h5") as inner, h5py.File(inner) as file:
                file.visititems(visit)
        else:
            with h5py.File(path) as file:
                file.visititems(visit)
    except (OSError, KeyError, RuntimeError) as error:
        raise ModelError(f"model.weights={path} is not a Keras weights file or is damaged ({error})") from error
    return shapes


def _shapes(network: keras.Model) -> Counter[tuple[int, ...]]:
    return Counter(tuple(variable.shape) for variable in network.weights)


def _check_sizes(network: keras.Model, path: Path, backbone: Backbone, image_size: int, alpha: float | None) -> None:
    """Raise a ModelError unless the file holds arrays of exactly the network's shapes; Keras ignores extra ones."""
    given, wanted = _parameters_by_shape(path), _shapes(network)
    if given == wanted:
        return
    counts = f"the file holds {sum(given.values())} arrays, the backbone has {sum(wanted.values())}"
    if missing := wanted - given:
        shape = max(missing, key=lambda s: (len(s), s))
        counts += f"; none or too few of shape {list(shape)} (wanted {wanted[shape]}, found {given[shape]})"
    for other in [a for a in ALPHAS if a != (alpha or 1.0)] if backbone.takes_alpha else []:
        if _shapes(backbone.build(image_size, other, None)) == given:
            raise ModelError(_misfit(path, backbone, alpha, f"it is for alpha {other:g}; set model.alpha={other:g}"))
    raise ModelError(_misfit(path, backbone, alpha, counts))
