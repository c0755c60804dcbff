"""Our input, opened as a run opens it: what several measurements share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tensorflow as tf

from trainer.config import Augmentation, Data
from trainer.contracts import Dataset
from trainer.data.order import Order
from trainer.data.pipeline import training_batches
from trainer.data.pixels import Cache, Pixels, memory_budget_default, open_pixels
from trainer.data.sources import open_dataset

FLIP_ROTATE_ZOOM = Augmentation(flip_horizontal=True, rotation=72, zoom=0.2, fill="reflect")  # of the recipe


def open_data(root: Path | None, cache_dir: Path, note: Callable[[str], None] = print) -> Dataset:
    """All photos of class folders to train on; the built-in digits where there is no folder."""
    data = Data(source="image_folder", root=str(root), validation_fraction=0.0) if root else Data(source="digits")
    return open_dataset(data, seed=1, cache_dir=cache_dir, max_examples=None, note=note)


def open_training_pixels(
    dataset: Dataset, size: int, cache: Cache, cache_dir: Path, note: Callable[[str], None] = print
) -> Pixels:
    """The decoded training images."""
    return open_pixels(
        dataset.splits["train"],
        size=size,
        resize="stretch",
        cache=cache,
        cache_dir=cache_dir,
        fingerprint=dataset.fingerprint,
        memory_budget=memory_budget_default(),
        disk_budget=0,
        threads=None,
        on_error="fail",
        note=note,
    )


def stream(pixels: Pixels, batch_size: int, augmentation: Augmentation) -> tf.data.Dataset:
    """Training batches from the first on, endless."""
    return training_batches(pixels, Order(batch_size, seed=1, window=8192), replicas=1, augmentation=augmentation)
