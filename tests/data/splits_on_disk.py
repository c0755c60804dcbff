"""A small split as image files, and the same images as record shards."""

from pathlib import Path

import numpy as np
import tensorflow as tf

from tests.data.images import encode_noise, serialize_record
from trainer.data.images import Pixels, count_image_bytes, fill_cache, plan_image_cache
from trainer.types import Shard, Split

COUNT, SIDE = 37, 10


def encode_jpeg(number: int) -> bytes:
    return encode_noise(number, size=(13, 17))


def make_labels() -> np.ndarray:
    return (np.arange(COUNT) % 3).astype(np.int32)


def write_file_split(root: Path) -> Split:
    root.mkdir(parents=True, exist_ok=True)
    files = tuple(str(root / f"{i:02d}.jpg") for i in range(COUNT))
    for number, file in enumerate(files):
        Path(file).write_bytes(encode_jpeg(number))
    return Split("train", make_labels(), files=files)


def write_shard_split(root: Path) -> Split:
    """Four shards; of the second the split leaves out two records at each end."""
    root.mkdir(parents=True, exist_ok=True)
    shards, at = [], 0
    for number, (start, stop, count) in enumerate([(0, 9, 9), (2, 12, 14), (0, 1, 1), (0, 17, 17)]):
        path = root / f"{number}.tfrec"
        with tf.io.TFRecordWriter(str(path)) as writer:
            for i in range(count):
                image = encode_jpeg(at + i - start) if start <= i < stop else b"not of this split"
                writer.write(serialize_record(image=image))
        shards.append(Shard(str(path), count, start, stop))
        at += stop - start
    assert at == COUNT
    return Split("train", make_labels(), shards=tuple(shards))


def open_pixels(
    split: Split, cache: str, folder: Path, notes: list[str] | None = None, memory_budget: int = 10**9,
    disk_budget: int = 10**9, fingerprint: str = "abc", **changes: object,
) -> Pixels:  # fmt: skip
    """Decoded images of a split, with their cache in `folder`."""
    options: dict[str, object] = {"size": SIDE, "resize": "stretch", "on_error": "fail", "threads": 2}
    pixels = Pixels(split, log_message=(notes if notes is not None else []).append, **(options | changes))  # type: ignore[arg-type]
    needed = count_image_bytes(split, pixels.size)
    plan = plan_image_cache(cache, needed, memory_budget, disk_budget, read_once=False)  # type: ignore[arg-type]
    fill_cache(pixels, plan, folder / "cache", fingerprint)
    return pixels
