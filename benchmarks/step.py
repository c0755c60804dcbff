"""The whole training loop against the compiled step alone on one batch in memory.

    python -m benchmarks.step --data FOLDER --weights FILE --alpha 0.35

"loop" and "bare" run the same compiled step (several steps per call): "loop" takes its batches from the pipeline of a
run (decoded cache, shuffling, optional augmentation), "bare" repeats one batch. Rounds are interleaved; the ratio is
per round.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from benchmarks.arguments import (
    BATCH,
    FLIP_ROTATE_ZOOM,
    SIZE,
    all_to_train,
    argument_parser,
    command_of,
    describe_data,
    describe_model,
    output_folder,
    photos,
)
from benchmarks.pipelines import open_training, stream
from benchmarks.plain_keras import FROM_LAYER, build
from benchmarks.results import Comparison, Result, save
from trainer.config.phases import Optimizer, Schedule
from trainer.config.schema import Augmentation, Model
from trainer.models.classifier import build_classifier
from trainer.models.freezing import set_trainable_layers
from trainer.training.optimizers import build_optimizer, build_schedule
from trainer.training.step import StepSettings, TrainingStep

STEPS = 10  # per call
KERAS = "Keras' step"
RATIOS = (("loop", "bare step"), ("loop, augmented", "bare step, float images"), ("loop", KERAS))
PHASES = {"none": "head", "from_layer:100": "from layer 100"}
HOW = """The compiled step of a run, {steps} steps per call, interleaved within one process: its batches from the
pipeline of a run (decoded images in memory), against one batch in memory; with augmentation (flip, rotation, zoom on
the same cores), against one batch of float images. "Keras' step" is the function that `fit` calls for the same model
and phase, compiled with `steps_per_execution={steps}`, on the same batch in memory, without the rest of `fit`. {data};
{model}."""


def endless(batches: tf.data.Dataset) -> Iterator[Any]:
    """The first batch, repeated from memory."""
    return iter(tf.data.Dataset.from_tensors(next(iter(batches))).repeat())


def build_step(model: Model, classes: int, thaw: str) -> TrainingStep:
    """The step of a phase with Adam."""
    classifier = build_classifier(model, classes, 1)
    plan = set_trainable_layers(classifier, thaw, "frozen")
    rate = build_schedule(Schedule(), 1e-5, total_steps=1, steps_per_epoch=1, batch_size=1)
    optimizer = build_optimizer(Optimizer(), rate)
    return TrainingStep(tf.distribute.get_strategy(), classifier, plan.trainable, optimizer, StepSettings(seed=1))


def keras_step(options: argparse.Namespace, classes: int, thaw: str, batches: Iterator[Any]) -> Callable[[], object]:
    """A function that takes `STEPS` steps of Keras' own training function."""
    model, backbone = build(classes, str(options.weights), options.alpha, augment=False)
    if thaw != "none":
        backbone.trainable = True
        for layer in backbone.layers[:FROM_LAYER]:
            layer.trainable = False
    model.compile(keras.optimizers.Adam(1e-5), loss="sparse_categorical_crossentropy", steps_per_execution=STEPS)
    model.make_train_function()
    examples = next(batches)
    batch = tf.cast(examples["image"], tf.float32), examples["label"]
    source = iter(tf.data.Dataset.from_tensors(batch).repeat())
    return lambda: float(model.train_function(source)["loss"])


def measure(options: argparse.Namespace) -> Result:
    rounds = options.rounds or 9
    comparisons = []
    model = Model(backbone="MobileNetV2", weights=str(options.weights), alpha=options.alpha, image_size=SIZE)
    tf.config.experimental.enable_op_determinism()
    with photos(options) as root:
        dataset, pixels = open_training(all_to_train(root), SIZE, "memory")
        plain, augmented = (stream(pixels, BATCH, kind) for kind in (Augmentation(), FLIP_ROTATE_ZOOM))
        for thaw, phase in PHASES.items():
            step = build_step(model, len(dataset.class_names), thaw)
            sources = {
                "bare step": endless(plain),
                "bare step, float images": endless(augmented),
                "loop": iter(plain),
                "loop, augmented": iter(augmented),
            }
            takes: dict[str, Callable[[], object]] = {
                name: partial(step.run, batches, STEPS, 0, 0) for name, batches in sources.items()
            }
            takes[KERAS] = keras_step(options, len(dataset.class_names), thaw, endless(plain))
            speeds: dict[str, list[float]] = {name: [] for name in takes}
            for turn in range(rounds + 1):
                for name, take in takes.items():
                    began = time.perf_counter()
                    take()
                    if turn:  # the first traces
                        speeds[name].append(BATCH * STEPS / (time.perf_counter() - began))
            for name, against in RATIOS:
                comparisons.append(Comparison(f"{phase}: {name}", against, "images/s", speeds[name], speeds[against]))
        how = HOW.replace("\n", " ").format(
            steps=STEPS, data=describe_data(options, root), model=describe_model(options)
        )
    return Result(
        name=f"step-alpha-{options.alpha:g}",
        title=f"Training step, MobileNetV2 of width {options.alpha:g}",
        how=how,
        command=command_of("step", options, rounds),
        comparisons=comparisons,
    )


def main() -> None:
    options = argument_parser(__doc__).parse_args()
    save(measure(options), output_folder(options))


if __name__ == "__main__":
    main()
