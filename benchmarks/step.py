"""The whole training loop against the bare compiled step on one batch held in memory.

    python -m benchmarks.step --data FOLDER --weights FILE --alpha 0.35 --size 160

Both run the same compiled step (several steps a call) of the fine-tuning phase from layer 100; "loop" draws its batches
from the pipeline of a real run (decoded cache, shuffling, optional augmentation), "bare" repeats one batch. Rounds are
interleaved; the ratio is taken round by round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator

import tensorflow as tf

from benchmarks.pipelines import open_training, stream
from trainer.config import Augmentation, Data, Model
from trainer.config_phases import Optimizer, Schedule
from trainer.models.classifier import build_classifier
from trainer.models.freezing import apply_thaw
from trainer.training.optimizers import build_optimizer, build_schedule
from trainer.training.step import StepSettings, TrainingStep

STEPS = 10  # in one call


def endless(batches: tf.data.Dataset) -> Iterator[object]:
    """The first batch for ever, from memory."""
    return iter(tf.data.Dataset.from_tensors(next(iter(batches))).repeat())


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--data", help="class folders; without it the built-in digits")
    arguments.add_argument("--weights", default="none")
    arguments.add_argument("--alpha", type=float, default=0.35)
    arguments.add_argument("--size", type=int, default=160)
    arguments.add_argument("--batch", type=int, default=32)
    arguments.add_argument("--rounds", type=int, default=9)
    options = arguments.parse_args()

    tf.config.experimental.enable_op_determinism()
    source = Data(source="image_folder", root=options.data) if options.data else Data(source="digits")
    model = Model(backbone="MobileNetV2", weights=options.weights, alpha=options.alpha, image_size=options.size)
    dataset, pixels = open_training(source, options.size, "memory")
    flip = Augmentation(flip_horizontal=True, rotation=72, zoom=0.2, fill="reflect")

    for thaw in ("none", "from_layer:100"):
        classifier = build_classifier(model, len(dataset.class_names), 1)
        plan = apply_thaw(classifier, thaw, "frozen")
        rate = build_schedule(Schedule(), 1e-5, total_steps=1, steps_per_epoch=1, batch_size=1)
        step = TrainingStep(
            tf.distribute.get_strategy(),
            classifier,
            plan.trainable,
            build_optimizer(Optimizer(), rate),
            StepSettings(seed=1),
        )
        sources = {
            "bare": endless(stream(pixels, options.batch, Augmentation())),
            "bare, float images": endless(stream(pixels, options.batch, flip)),
            "loop": iter(stream(pixels, options.batch, Augmentation())),
            "loop, augmented": iter(stream(pixels, options.batch, flip)),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sources}
        for turn in range(options.rounds + 1):
            for name, batches in sources.items():
                began = time.perf_counter()
                step.run(batches, STEPS, 0, 0)
                if turn:  # the first traces
                    seconds[name].append(time.perf_counter() - began)
        for name, against in (("loop", "bare"), ("loop, augmented", "bare, float images")):
            ratios = [b / a for a, b in zip(seconds[name], seconds[against], strict=True)]
            speed = options.batch * STEPS / statistics.median(seconds[name])
            print(
                f"thaw {thaw}: {name} {speed:,.0f} images/s, {statistics.median(ratios):.3f} of {against} "
                f"(min {min(ratios):.3f}, max {max(ratios):.3f}, {options.rounds} rounds)"
            )


if __name__ == "__main__":
    main()
