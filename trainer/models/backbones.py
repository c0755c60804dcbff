"""Registry of backbones, the classification networks of keras.applications, by name.

Keras is imported only to build a network or to preprocess images, so that a lookup by name is fast.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import keras


@dataclass(frozen=True)
class BackboneSpec:
    """A network of keras.applications.

    The blocks of a network are derived from its layer names with `block_pattern`: the layer `block_6_expand` of
    MobileNetV2 is in `block_6`. In the Inception and NASNet families, most layers of a block have automatic names
    (`conv2d_17`) and precede the layer that names the block. In these families, a block begins right after the previous
    block, and the first block right after the layer `stem_end`.
    """

    name: str  # constructor in keras.applications, such as "MobileNetV2"
    module: str  # module of keras.applications with its preprocess_input, such as "mobilenet_v2"
    default_size: int  # side in pixels of the images that the ImageNet weights were trained on
    min_size: int  # minimum image side in pixels
    block_pattern: str  # regular expression, searched in layer names
    block_name: str = r"\1"  # template of the block name, expanded with the match
    stem_end: str | None = None  # last layer before the first block; None if layer names show where each block begins
    takes_alpha: bool = False  # whether the network has a width multiplier
    weight_sizes: tuple[int, ...] = ()  # image sides with separate ImageNet weights; () if one file is for all sizes

    def preprocess(self, images: Any) -> Any:
        """Apply the network's `preprocess_input` from Keras to RGB images, float32 [b, S, S, 3] in 0..255."""
        import keras

        return getattr(keras.applications, self.module).preprocess_input(images)

    def build(self, image_size: int, alpha: float | None, weights: str | None) -> keras.Model:
        """Build the network without its classification top. It maps float [b, S, S, 3] to float [b, h, w, C].

        Args:
            image_size: S, the side of the square images in pixels.
            alpha: width multiplier; None means 1. Must be None if the network has no width multiplier.
            weights: "imagenet", which Keras downloads unless they are cached, or None for random values.

        Raises:
            ModelError: the image size is too small, the network has no width multiplier, or Keras rejects the
                arguments.
            Exception: Keras cannot download the ImageNet weights.
        """
        import keras

        if image_size < self.min_size:
            problem = f"is too small for {self.name} (ImageNet weights: {self.default_size} px)"
            fix = f"use at least {self.min_size}"
            raise ModelError(problem, key="model.image_size", value=image_size, fix=fix)
        if alpha is not None and not self.takes_alpha:
            names = ", ".join(b.name for b in get_backbones().values() if b.takes_alpha)
            problem, fix = f"{self.name} takes no alpha", f"set it to null; only {names} take it"
            raise ModelError(problem, key="model.alpha", value=alpha, fix=fix)
        options: dict[str, Any] = {"alpha": alpha or 1.0} if self.takes_alpha else {}
        try:
            network = getattr(keras.applications, self.name)(
                include_top=False, weights=weights, input_shape=(image_size, image_size, 3), **options
            )
        except ValueError as error:
            problem, fix = f"cannot be built by Keras: {error}", "change model.image_size or model.alpha"
            raise ModelError(problem, key="model.backbone", value=self.name, fix=fix) from error
        _renumber_automatic_names(network)
        return network

    def name_weights_file(self, image_size: int, alpha: float | None) -> str:
        """Return the name of the file with the ImageNet weights in a folder that `trainer.prepare weights=...` writes.

        Examples: Xception.weights.h5, and MobileNetV2_0.35_160.weights.h5 for alpha 0.35 at 160 pixels. Keras has
        separate weights for several image sizes of MobileNet and MobileNetV2, and uses the weights for 224 pixels at
        any other size.
        """
        alpha_suffix = f"_{alpha or 1.0:g}" if self.takes_alpha else ""
        size = image_size if image_size in self.weight_sizes else self.default_size
        return f"{self.name}{alpha_suffix}{f'_{size}' if self.weight_sizes else ''}.weights.h5"

    def find_block(self, layer_name: str) -> str | None:
        """Return the block that a layer name contains; None for layers of stem and top, and for automatic names."""
        match = re.search(self.block_pattern, layer_name)
        return match.expand(self.block_name) if match else None

    def find_block_starts(self, layer_names: Sequence[str]) -> dict[str, int]:
        """Return the index of each block's first layer, by block name. `layer_names` are all layer names in order."""
        starts: dict[str, int] = {}
        previous_index = layer_names.index(self.stem_end) if self.stem_end else 0
        for index, name in enumerate(layer_names):
            if block := self.find_block(name):
                starts.setdefault(block, previous_index + 1 if self.stem_end else index)
                previous_index = index
        return starts


def _renumber_automatic_names(network: keras.Model) -> None:
    """Number a network's layers with automatic names from 0: conv2d, conv2d_1, conv2d_2, ...

    Keras numbers layers across all networks of a process, but freezing patterns and checkpoints need stable names.
    """
    import keras

    layers_by_kind: dict[str, list[tuple[int, keras.Layer]]] = {}
    for layer in network.layers:
        words = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", type(layer).__name__)
        kind = re.sub(r"([a-z])([A-Z])", r"\1_\2", words).lower()  # like Keras: Conv2D -> conv2d, ReLU -> re_lu
        match = re.fullmatch(re.escape(kind) + r"(?:_(\d+))?", layer.name)
        if match and not isinstance(layer, keras.layers.InputLayer):
            layers_by_kind.setdefault(kind, []).append((int(match[1] or 0), layer))
    for kind, layers in layers_by_kind.items():
        first_suffix = min(suffix for suffix, _ in layers)
        for suffix, layer in layers:
            layer.name = f"{kind}_{suffix - first_suffix}" if suffix > first_suffix else kind


@cache
def get_backbones() -> dict[str, BackboneSpec]:
    """Return all backbones by normalized name, such as "mobilenetv2"."""
    # Values of `block_pattern`.
    mobile_v3 = r"^(expanded_conv(?:_\d+)?)_(?:expand|depthwise|squeeze|project|add)"
    inception_resnet = r"^(mixed_\d[a-z]|block\d+_\d+|conv_7b)"
    cells = r"^(?:normal|reduction|adjust|separable).*?_(stem_\d+|reduce_\d+|\d+)$"
    staged, efficient = r"^(conv\d_block\d+)_", r"^(block\d+[a-z])_"
    convnext = r"(stage_\d+_block_\d+|downsampling_block_\d+)"
    efficient_sizes = (224, 240, 260, 300, 380, 456, 528, 600)
    efficient_v2_sizes = {"B0": 224, "B1": 240, "B2": 260, "B3": 300, "S": 384, "M": 480, "L": 480}
    specs = [
        BackboneSpec("MobileNet", "mobilenet", 224, 32, r"^conv_(?:pad|dw|pw)_(\d+)", r"block_\1",
                     takes_alpha=True, weight_sizes=(128, 160, 192, 224)),
        BackboneSpec("MobileNetV2", "mobilenet_v2", 224, 32, r"^(expanded_conv|block_\d+)_",
                     takes_alpha=True, weight_sizes=(96, 128, 160, 192, 224)),
        BackboneSpec("Xception", "xception", 299, 71, r"^(block\d+)_"),
        BackboneSpec("InceptionV3", "inception_v3", 299, 75, r"^(mixed\d+)$", stem_end="max_pooling2d_1"),
        BackboneSpec("InceptionResNetV2", "inception_resnet_v2", 299, 75, inception_resnet, stem_end="max_pooling2d_1"),
    ]  # fmt: skip
    # Family, module, default size by variant, block pattern, other fields.
    families: list[tuple[str, str, dict[Any, int], str, dict[str, Any]]] = [
        ("MobileNetV3", "mobilenet_v3", dict.fromkeys(("Small", "Large"), 224), mobile_v3, {"takes_alpha": True}),
        ("NASNet", "nasnet", {"Mobile": 224, "Large": 331}, cells, {"block_name": r"cell_\1", "stem_end": "stem_bn1"}),
        ("VGG", "vgg16", {16: 224}, r"^(block\d)_", {}),
        ("VGG", "vgg19", {19: 224}, r"^(block\d)_", {}),
        ("ResNet", "resnet", dict.fromkeys((50, 101, 152), 224), staged, {}),
        ("ResNet", "resnet_v2", dict.fromkeys(("50V2", "101V2", "152V2"), 224), staged, {}),
        ("DenseNet", "densenet", dict.fromkeys((121, 169, 201), 224), staged, {}),
        ("EfficientNetB", "efficientnet", dict(enumerate(efficient_sizes)), efficient, {}),
        ("EfficientNetV2", "efficientnet_v2", efficient_v2_sizes, efficient, {}),
        ("ConvNeXt", "convnext", dict.fromkeys(("Tiny", "Small", "Base", "Large", "XLarge"), 224), convnext, {}),
    ]
    specs += [
        BackboneSpec(f"{family}{variant}", module, size, 32, pattern, **options)
        for family, module, sizes, pattern, options in families
        for variant, size in sizes.items()
    ]
    return {_normalize(backbone.name): backbone for backbone in specs}


def _normalize(name: str) -> str:
    """Return a name in lower case without spaces, underscores, dots and hyphens."""
    return re.sub(r"[\s_.-]", "", name).lower()


def find_backbone(name: str) -> BackboneSpec:
    """Return the backbone called `name`. Case, spaces, dots, underscores and hyphens are ignored.

    Raises:
        ModelError: no backbone has that name. Its `fix` suggests the closest name, or lists all names.
    """
    registry = get_backbones()
    normalized = _normalize(name)
    if normalized in registry:
        return registry[normalized]
    matches = difflib.get_close_matches(normalized, registry, 1, cutoff=0.5)
    names = ", ".join(backbone.name for backbone in registry.values())
    fix = f"did you mean {registry[matches[0]].name}?" if matches else f"use one of {names}"
    raise ModelError("is not a known backbone", key="model.backbone", value=name, fix=fix)


def parse_backbones(text: str, key: str) -> list[tuple[BackboneSpec, float | None]]:
    """Parse a list such as [mobilenet_v2,mobilenet_v2:0.35,xception] into backbones, each with its alpha or None.

    Args:
        text: value of a command-line argument.
        key: name of the argument, for error messages.

    Raises:
        ConfigError: the list is empty, a backbone is unknown or has no width multiplier, or an alpha is not a number.
    """
    selection = []
    for item in filter(None, map(str.strip, text.strip("[] ").split(","))):
        name, colon, width = item.partition(":")
        try:
            spec = find_backbone(name)
        except ModelError as error:
            raise ConfigError(error.problem, key=key, value=item, fix=error.fix) from None
        if colon and not re.fullmatch(r"\d+(\.\d+)?", width):
            raise ConfigError("has an alpha that is not a number", key=key, value=item, fix=f"write {name}:0.35")
        if colon and not spec.takes_alpha:
            raise ConfigError(f"{spec.name} takes no alpha", key=key, value=item, fix=f"write {name}")
        selection.append((spec, float(width) if colon else None))
    if not selection:
        raise ConfigError("names no backbone", key=key, value=text, fix=f"write {key}=[mobilenet_v2,xception]")
    return selection
