"""Small pictures in class folders."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def picture(number: int, kind: str = "JPEG", mode: str = "RGB", side: int = 12) -> bytes:
    """An encoded picture of noise, another one for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind)
    return out.getvalue()


def fill_folder(root: Path, counts: dict[str, int], start: int = 0) -> Path:
    """`root/<class>/00.jpg`, ...: `counts[class]` different pictures a class."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / name / f"{i:02d}.jpg").write_bytes(picture(start))
            start += 1
    return root
