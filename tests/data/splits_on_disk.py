"""A small split as image files, and the same images as record shards."""

import io
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image

from trainer.data.images import Pixels, fill_cache, image_bytes, plan_image_cache
from trainer.types import Shard, Split

COUNT, SIDE = 37, 10


def jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (13, 17, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def labels() -> np.ndarray:
    return (np.arange(COUNT) % 3).astype(np.int32)


def file_split(root: Path) -> Split:
    root.mkdir(parents=True, exist_ok=True)
    files = tuple(str(root / f"{i:02d}.jpg") for i in range(COUNT))
    for number, file in enumerate(files):
        Path(file).write_bytes(jpeg(number))
    return Split("train", labels(), files=files)


def record(data: bytes) -> bytes:
    feature = {"image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[data]))}
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


def shard_split(root: Path) -> Split:
    """Four shards; of the second the split leaves out two records at each end."""
    root.mkdir(parents=True, exist_ok=True)
    shards, at = [], 0
    for number, (start, stop, count) in enumerate([(0, 9, 9), (2, 12, 14), (0, 1, 1), (0, 17, 17)]):
        path = root / f"{number}.tfrec"
        with tf.io.TFRecordWriter(str(path)) as writer:
            for i in range(count):
                writer.write(record(jpeg(at + i - start) if start <= i < stop else b"not of this split"))
        shards.append(Shard(str(path), count, start, stop))
        at += stop - start
    assert at == COUNT
    return Split("train", labels(), shards=tuple(shards))


def opened(
    split: Split,
    cache: str,
    folder: Path,
    notes: list[str] | None = None,
    memory_budget: int = 10**9,
    disk_budget: int = 10**9,
    cache_dir: Path | None = None,
    fingerprint: str = "abc",
    **changes: object,
) -> Pixels:
    options: dict[str, object] = {"size": SIDE, "resize": "stretch", "on_error": "fail", "threads": 2}
    pixels = Pixels(split, log_message=(notes if notes is not None else []).append, **(options | changes))  # type: ignore[arg-type]
    needed = image_bytes(split, pixels.size)
    plan = plan_image_cache(cache, needed, memory_budget, disk_budget, once=False)  # type: ignore[arg-type]
    fill_cache(pixels, plan, cache_dir or folder / "cache", fingerprint)
    return pixels
