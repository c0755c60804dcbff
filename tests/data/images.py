"""Small images, in class folders and in records."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def encode_noise(number: int, kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (12, 12)) -> bytes:
    """An encoded image of noise with this height and width, a different one for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind)
    return out.getvalue()


def serialize_record(**values: bytes | int | list[float]) -> bytes:
    """A serialized tf.train.Example with these fields: bytes, int64 or floats."""
    import tensorflow as tf

    fields = {}
    for name, value in values.items():
        if isinstance(value, bytes):
            fields[name] = tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        elif isinstance(value, list):
            fields[name] = tf.train.Feature(float_list=tf.train.FloatList(value=value))
        else:
            fields[name] = tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
    return tf.train.Example(features=tf.train.Features(feature=fields)).SerializeToString()


def fill_folder(root: Path, counts: dict[str, int], start: int = 0) -> Path:
    """Write `root/<class>/00.jpg`, ...: `counts[class]` different images per class."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / name / f"{i:02d}.jpg").write_bytes(encode_noise(start))
            start += 1
    return root
