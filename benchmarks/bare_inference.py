"""A frozen backbone over batches held in memory: how fast a pass that computes features can be at best.

    python -m benchmarks.bare_inference --weights FILE --alpha 0.35 --batches 16 32 64 128

One tf.function, uint8 images in, pooled features out; nothing is read, stored or shuffled.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import tensorflow as tf

from benchmarks.asking import SIZE, arguments_of
from trainer.config import Model
from trainer.models.classifier import build_classifier

IMAGES = 512  # in one round


def bare_pass(model: Model, batch: int, images: int = IMAGES) -> Callable[[], float]:
    """Traced and run once; each call runs `images` // `batch` batches and returns images/s."""
    classifier = build_classifier(model, 5, seed=1)
    size = classifier.image_size
    held = [
        tf.cast(tf.random.stateless_uniform([batch, size, size, 3], [n, 0], 0, 256, tf.int32), tf.uint8)
        for n in range(2)
    ]
    forward = tf.function(lambda pixels: classifier.pooled(classifier.features(pixels)))
    forward(held[0])

    def once() -> float:
        began = time.perf_counter()
        for number in range(max(images // batch, 1)):
            features = forward(held[number % 2])
        features.numpy()
        return max(images // batch, 1) * batch / (time.perf_counter() - began)

    return once


def main() -> None:
    arguments = arguments_of(__doc__)
    arguments.add_argument("--batches", type=int, nargs="+", default=[16, 32, 64, 128])
    asked = arguments.parse_args()
    tf.config.experimental.enable_op_determinism()
    model = Model(backbone="MobileNetV2", weights=str(asked.weights), alpha=asked.alpha, image_size=SIZE)
    passes = {batch: bare_pass(model, batch) for batch in asked.batches}
    speeds: dict[int, list[float]] = {batch: [] for batch in passes}
    for _ in range(asked.rounds or 5):
        for batch, once in passes.items():
            speeds[batch].append(once())
    for batch, each in speeds.items():
        print(f"batch {batch}: {statistics.median(each):,.0f} images/s ({min(each):,.0f} to {max(each):,.0f})")


if __name__ == "__main__":
    main()
