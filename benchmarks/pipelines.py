"""The pipeline of a real run, as benchmarks open it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import tensorflow as tf

from trainer.config.schema import Augmentation, Data
from trainer.data.images import Cache, Pixels, memory_budget_default, open_pixels
from trainer.data.open import open_dataset
from trainer.data.order import Order
from trainer.data.pipeline import training_batches
from trainer.types import Dataset


def open_training(source: Data, size: int, kept: Cache) -> tuple[Dataset, Pixels]:
    """A dataset, and its training images at `size` x `size` pixels, decoded images kept as `data.cache` would say."""
    cache = Path(tempfile.mkdtemp())
    dataset = open_dataset(source, seed=1, cache_dir=cache, max_examples=None, note=print)
    pixels = open_pixels(
        dataset.splits["train"],
        size=size,
        resize="stretch",
        cache=kept,
        cache_dir=cache,
        fingerprint=dataset.fingerprint,
        memory_budget=memory_budget_default(),
        disk_budget=0,
        threads=None,
        on_error="fail",
        note=print,
    )
    return dataset, pixels


def stream(pixels: Pixels, batch: int, augmentation: Augmentation) -> tf.data.Dataset:
    """Shuffled training batches of one replica, endless."""
    return training_batches(pixels, Order(batch, seed=1, window=8192), replicas=1, augmentation=augmentation)
