"""The input pipeline of a run, opened without a run."""

import tempfile
from pathlib import Path

import tensorflow as tf

from trainer.config.schema import Augmentation, Data
from trainer.data.host import get_default_memory_budget
from trainer.data.images import CacheSetting, Pixels, count_image_bytes, fill_cache, plan_image_cache
from trainer.data.open import open_dataset
from trainer.data.order import Order
from trainer.data.pipeline import build_training_batches
from trainer.types import Dataset


def open_training_images(source: Data, size: int, cache: CacheSetting) -> tuple[Dataset, Pixels]:
    """Open a dataset, and its training images at `size` x `size` pixels. `cache` is a value of `data.cache`."""
    cache_dir = Path(tempfile.mkdtemp())
    dataset = open_dataset(source, seed=1, cache_dir=cache_dir, max_examples=None, log_message=print)
    pixels = Pixels(dataset.splits["train"], size, "stretch", "fail", log_message=print)
    plan = plan_image_cache(
        cache, count_image_bytes(pixels.split, size), get_default_memory_budget(), 0, read_once=False
    )
    fill_cache(pixels, plan, cache_dir, dataset.fingerprint)
    return dataset, pixels


def build_training_stream(pixels: Pixels, batch: int, augmentation: Augmentation) -> tf.data.Dataset:
    """Build an infinite stream of shuffled, augmented training batches for one replica."""
    return build_training_batches(
        pixels, Order(batch, seed=1, window=8192), num_replicas=1, augmentation=augmentation
    ).dataset
