"""The configuration of the network: the backbone, its weights, and the head on top."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from trainer.config.base import Address, InvalidValue, Section

WEIGHTS_SUFFIXES = (".keras", ".h5", ".hdf5")  # suffixes of weights files in Keras formats
NAMED_WEIGHTS = ("imagenet", "glyphs", "none")  # values of model.weights that are not addresses


MAX_HIDDEN_LAYERS = 8  # in the head
HiddenUnits = Annotated[int, Field(ge=1, le=2**16)]


def _check_hidden_layers(units: tuple[int, ...]) -> tuple[int, ...]:
    if not 1 <= len(units) <= MAX_HIDDEN_LAYERS:
        fix = f"list the units of 1 to {MAX_HIDDEN_LAYERS} layers; null for none"
        raise InvalidValue(f"has {len(units)} layers", value=str(list(units)), fix=fix)
    return units


HiddenLayers = Annotated[tuple[HiddenUnits, ...], AfterValidator(_check_hidden_layers)]


class Model(Section):
    """The backbone, its weights, and the head on top."""

    backbone: str
    """Name of a network in `keras.applications`; auto: chosen by the numbers of images and classes (docs/phases.md)."""
    weights: Address = "imagenet"
    """imagenet, glyphs (included in the package), none (random), the path of a .weights.h5 or .keras file, or the path
    of a folder that `trainer.prepare weights=...` wrote. Local or in a bucket."""
    alpha: float | None = Field(None, gt=0, le=4)
    """MobileNet, MobileNetV2: multiplier of the number of filters in each layer; null: 1."""
    image_size: int | None = Field(None, ge=8, le=2048)
    """Side of the square input images in pixels; null: the backbone's default."""
    resize: Literal["stretch", "crop"] = "stretch"
    """How an image becomes square. stretch: its aspect ratio is changed; crop: its central square is used."""
    pooling: Literal["avg", "max"] = "avg"
    """Global pooling of the backbone's last feature maps."""
    hidden: HiddenUnits | HiddenLayers | None = None
    """Number of units of a hidden ReLU layer in the head, or a list with one number per hidden layer, from the backbone
    up; null: no hidden layers."""
    hidden_batch_norm: bool = False
    """BatchNormalization in each hidden layer of the head, before its ReLU (docs/phases.md)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout rate before the head's last layer."""
    l2: float = Field(0.0, ge=0, le=1e3)
    """L2 regularization factor of the head's kernels."""

    @property
    def hidden_units(self) -> tuple[int, ...]:
        """The number of units in each of the head's hidden layers, from the backbone up; empty if there are none."""
        if self.hidden is None:
            return ()
        return (self.hidden,) if isinstance(self.hidden, int) else self.hidden

    @property
    def has_weights_folder(self) -> bool:
        """Whether `weights` is the address of a folder that has one weights file per network."""
        return self.weights not in NAMED_WEIGHTS and not self.weights.endswith(WEIGHTS_SUFFIXES)

    @model_validator(mode="after")
    def _check_auto_backbone(self) -> Model:
        """Reject `backbone=auto` with settings that fit only some backbones."""
        if self.backbone == "auto" and self.weights not in ("imagenet", "none") and not self.has_weights_folder:
            problem = f"can choose any network, but weights={self.weights} are of a single one"
            raise InvalidValue(problem, key="backbone", value="auto", fix="set model.backbone to that network")
        if self.backbone == "auto" and self.alpha is not None:
            problem = f"can choose a network without alpha, but alpha={self.alpha:g}"
            raise InvalidValue(problem, key="backbone", value="auto", fix="set model.alpha=null")
        return self
