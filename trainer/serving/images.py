"""What is refused before it costs anything: no image, an image of too many pixels, one made to be slow to decode."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF")  # what trainer.imaging decodes
SCANS = 100  # of a JPEG, each as much work as the whole picture; cameras and the web write at most about ten

Image.MAX_IMAGE_PIXELS = None  # PIL's own guard warns, or raises while the header is read; ours has a number


class Refused(Exception):
    """A request that is not answered: the status, and a sentence for who sent it."""

    def __init__(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(text)
        self.status, self.text, self.headers = status, text, headers or {}


@dataclass(frozen=True)
class Picture:
    """An encoded image that may be decoded."""

    data: bytes
    name: str
    pixels: int


def examined(data: bytes, name: str, max_pixels: int) -> Picture:
    """Look at the header of an image; nothing is decoded.

    Raises:
        Refused: 400 no image; 413 too many pixels; 415 an animation.
    """
    if not data:
        raise Refused(400, f"{name} is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height, kind = *image.size, image.format
            if width * height <= max_pixels and kind in ("GIF", "WEBP") and getattr(image, "is_animated", False):
                raise Refused(415, f"{name} is an animation; send one picture of it")
    except Refused:
        raise
    except Exception as error:  # of whatever kind: PIL reads what a stranger wrote
        raise Refused(400, f"{name} is not an image that can be read: {', '.join(FORMATS)} can") from error
    if width * height > max_pixels:
        raise Refused(413, f"{name} has {width} x {height} pixels, at most {max_pixels:,} are decoded; send it smaller")
    if kind == "JPEG" and data.count(b"\xff\xda") > SCANS:
        raise Refused(400, f"{name} is a JPEG of more than {SCANS} scans; save it as a usual one")
    return Picture(data, name, width * height)
