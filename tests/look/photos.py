"""Photos of many formats and hostile names, with copies, an orientation mark and a corrupt file."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

HOSTILE = "<script>alert(1)<b> 'x' & é"


def make_smooth_image(seed: int, width: int = 120, height: int = 80) -> Image.Image:
    """A photo-like image: random colors of 6 x 4 areas, interpolated."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def encode_image(image: Image.Image, kind: str = "JPEG", orientation: int = 1) -> bytes:
    """Encode an image, with an EXIF orientation if it is not 1."""
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    image.save(out, kind, **({"exif": exif} if orientation > 1 else {}))
    return out.getvalue()


def encode_16_bit_png(width: int, height: int) -> bytes:
    """An RGB PNG with 16 bits per channel, which Pillow cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    pixels = np.random.default_rng(0).integers(0, 1 << 16, (height, width, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def write_photos(root: Path) -> Path:
    """Write train, validation and test folders of two classes, 13 + 4 + 3 images and two unreadable files.

    One image is in train and validation byte for byte, one in train and test as another size, one twice in train with
    both labels.
    """
    files = {
        f"train/{HOSTILE}/{k}.jpg": encode_image(make_smooth_image(k, *size))
        for k, size in enumerate([(120, 80)] * 5 + [(80, 120)] * 2)
    }
    files |= {
        f"train/{HOSTILE}/turned.jpg": encode_image(make_smooth_image(20, 120, 60), orientation=6),
        f"train/{HOSTILE}/alpha.png": encode_image(make_smooth_image(21).convert("RGBA"), "PNG"),
        "train/dog/gray.webp": encode_image(make_smooth_image(22).convert("L"), "WEBP"),
        "train/dog/deep.png": encode_16_bit_png(40, 30),
        "train/dog/cmyk.jpg": encode_image(make_smooth_image(23).convert("CMYK")),
        "train/dog/a\nb.gif": encode_image(make_smooth_image(24), "GIF"),
        "train/dog/copy of 0.jpg": encode_image(make_smooth_image(0)),
        "train/dog/half.jpg": encode_image(make_smooth_image(25))[:700],
        "train/dog/text.jpg": b"not an image",
        "train/dog/notes.txt": b"ignored",
        f"validation/{HOSTILE}/same as 1.jpg": encode_image(make_smooth_image(1)),
        "validation/dog/a.bmp": encode_image(make_smooth_image(30), "BMP"),
        "validation/dog/b.bmp": encode_image(make_smooth_image(31), "BMP"),
        f"test/{HOSTILE}/small 2.jpg": encode_image(make_smooth_image(2).resize((90, 60))),
        "test/dog/a.jpg": encode_image(make_smooth_image(32)),
        "test/dog/b.jpg": encode_image(make_smooth_image(33)),
    }
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root
