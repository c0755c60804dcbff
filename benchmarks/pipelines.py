"""The input pipeline of a run, for benchmarks."""

import tempfile
from pathlib import Path

import tensorflow as tf

from trainer.config.schema import Augmentation, Data
from trainer.data.host import get_default_memory_budget
from trainer.data.images import Cache, Pixels, count_image_bytes, fill_cache, plan_image_cache
from trainer.data.open import open_dataset
from trainer.data.order import Order
from trainer.data.pipeline import build_training_batches
from trainer.types import Dataset


def open_training(source: Data, size: int, cached: Cache) -> tuple[Dataset, Pixels]:
    """A dataset, and its training images at `size` x `size` pixels; `cached` is the value of `data.cache`."""
    cache = Path(tempfile.mkdtemp())
    dataset = open_dataset(source, seed=1, cache_dir=cache, max_examples=None, log_message=print)
    pixels = Pixels(dataset.splits["train"], size, "stretch", "fail", log_message=print)
    plan = plan_image_cache(
        cached, count_image_bytes(pixels.split, size), get_default_memory_budget(), 0, read_once=False
    )
    fill_cache(pixels, plan, cache, dataset.fingerprint)
    return dataset, pixels


def stream(pixels: Pixels, batch: int, augmentation: Augmentation) -> tf.data.Dataset:
    """Infinite stream of shuffled training batches of one replica."""
    return build_training_batches(
        pixels, Order(batch, seed=1, window=8192), replicas=1, augmentation=augmentation
    ).dataset
