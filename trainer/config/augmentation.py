"""The configuration of image augmentation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from trainer.config.base import InvalidValue, Section


def _check_rotation(value: Any) -> Any:
    """Require one angle, or a pair of angles, from 0 to 180 degrees."""
    angles = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
    if not all(
        isinstance(angle, int | float) and not isinstance(angle, bool) and 0 <= angle <= 180 for angle in angles
    ):
        fix = "use degrees from 0 to 180, or [40, 108] to add a draw from each range"
        raise InvalidValue("is not an angle", fix=fix)
    return value


Rotation = Annotated[float | tuple[float, float], BeforeValidator(_check_rotation)]


class Augmentation(Section):
    """Random changes to training images, determined by the seed, the epoch and the image's index. 0 is off."""

    flip_horizontal: bool = False
    """Flip half of the images left to right."""
    flip_vertical: bool = False
    """Flip half of the images upside down."""
    rotation: Rotation = 0.0
    """Maximum rotation in degrees, in either direction. [40, 108]: the sum of two rotations, of up to 40 and up to 108
    degrees."""
    shift: float = Field(0.0, ge=0, le=1)
    """Maximum horizontal and vertical shift, as a fraction of the image side."""
    shear: float = Field(0.0, ge=0, lt=90)
    """Maximum shear in degrees, in either direction."""
    zoom: float = Field(0.0, ge=0, lt=1)
    """Range of the scale around 1: 0.2 draws from [0.8, 1.2]."""
    stretch: float = Field(0.0, ge=0, lt=1)
    """Range of the scales of width and height, drawn separately: 0.2 draws from [0.8, 1.2]."""
    crop: float = Field(0.0, ge=0, lt=1)
    """Minimum area of a random crop, as a fraction of the image; its aspect ratio is between 3/4 and 4/3."""
    contrast: float = Field(0.0, ge=0, lt=1)
    """Range of the contrast factor around 1: 0.2 draws from [0.8, 1.2]."""
    brightness: float = Field(0.0, ge=0, lt=1)
    """Maximum change of brightness, as a fraction of 255."""
    saturation: float = Field(0.0, ge=0, le=1)
    """Range of the saturation factor around 1: 0.2 draws from [0.8, 1.2]."""
    hue: float = Field(0.0, ge=0, le=0.5)
    """Maximum change of hue, as a fraction of the color circle."""
    randaugment: int = Field(0, ge=0, le=14)
    """Number of random operations per image (RandAugment)."""
    magnitude: int = Field(9, ge=0, le=30)
    """Magnitude of RandAugment's operations."""
    cutout: float = Field(0.0, ge=0, le=1)
    """Side of a gray square at a random position, as a fraction of the image side."""
    mixup: float = Field(0.0, ge=0, le=100)
    """Parameter alpha of Beta(alpha, alpha), from which the mixing weight of two neighbours in a batch is drawn."""
    cutmix: float = Field(0.0, ge=0, le=100)
    """Parameter alpha of Beta(alpha, alpha), from which the area of a square that is pasted from a neighbour in the
    batch is drawn. If mixup is also set, each of the two has probability 1/2."""
    fill: Literal["nearest", "constant", "reflect"] = "nearest"
    """Values of pixels outside the image. nearest: the nearest pixel; constant: black; reflect: the mirrored image."""

    @property
    def active(self) -> bool:
        """Whether any augmentation is on; `fill` and `magnitude` alone change nothing."""
        return any(value for name, value in self if name not in ("fill", "magnitude"))

    @property
    def mixes(self) -> bool:
        """Whether examples are mixed with others, by mixup or CutMix."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def rotations(self) -> tuple[float, ...]:
        """The maximum angle of each rotation, in degrees; empty if images are not rotated."""
        angles = self.rotation if isinstance(self.rotation, tuple) else (self.rotation,)
        return tuple(angle for angle in angles if angle)
