"""Small images in class folders."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def noise(number: int, kind: str = "JPEG", mode: str = "RGB", side: int = 12) -> bytes:
    """An encoded image of noise, a different one for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind)
    return out.getvalue()


def fill_folder(root: Path, counts: dict[str, int], start: int = 0) -> Path:
    """Write `root/<class>/00.jpg`, ...: `counts[class]` different images per class."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / name / f"{i:02d}.jpg").write_bytes(noise(start))
            start += 1
    return root
