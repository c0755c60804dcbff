"""Compare the training loop of a run with its compiled step alone on one batch in memory, and with Keras' step.

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
    BATCH_SIZE,
    FLIP_ROTATE_ZOOM,
    IMAGE_SIZE,
    choose_output_folder,
    describe_data,
    describe_model,
    format_command,
    make_argument_parser,
    open_photos,
    select_all_for_training,
)
from benchmarks.pipelines import build_training_stream, open_training_images
from benchmarks.plain_keras import FROM_LAYER, build_model
from benchmarks.results import Comparison, Result, save_result
from trainer.config.phases import Optimizer, Schedule
from trainer.config.schema import Augmentation, Model
from trainer.models.classifier import build_classifier
from trainer.models.freezing import set_trainable_layers
from trainer.training.optimizers import build_optimizer, build_schedule
from trainer.training.step import StepSettings, TrainingStep

STEPS = 10  # optimizer steps per call of the compiled function
KERAS = "Keras' step"
RATIOS = (("loop", "bare step"), ("loop, augmented", "bare step, float images"), ("loop", KERAS))
PHASES = {"none": "head", "from_layer:100": "from layer 100"}
HOW = """The compiled step of a run, {steps} steps per call, interleaved within one process: its batches from the
pipeline of a run (decoded images in memory), against one batch in memory; with augmentation (flip, rotation, zoom on
the same cores), against one batch of float images. "Keras' step" is the function that `fit` calls for the same model
and phase, compiled with `steps_per_execution={steps}`, on the same batch in memory, without the rest of `fit`. {data};
{model}."""


def repeat_first_batch(batches: tf.data.Dataset) -> Iterator[Any]:
    """Repeat the first batch of a dataset from memory."""
    return iter(tf.data.Dataset.from_tensors(next(iter(batches))).repeat())


def build_step(model: Model, classes: int, thaw: str) -> TrainingStep:
    """Build the training step of a phase that trains with Adam."""
    classifier = build_classifier(model, classes, 1)
    plan = set_trainable_layers(classifier, thaw, "frozen")
    schedule = build_schedule(Schedule(), 1e-5, total_steps=1, steps_per_epoch=1, batch_size=1)
    optimizer = build_optimizer(Optimizer(), schedule)
    return TrainingStep(tf.distribute.get_strategy(), classifier, plan.trainable, optimizer, StepSettings(seed=1))


def build_keras_step(
    options: argparse.Namespace, classes: int, thaw: str, batches: Iterator[Any]
) -> Callable[[], object]:
    """Build a function that runs `STEPS` steps with the training function that `keras.Model.fit` calls."""
    model, backbone = build_model(classes, str(options.weights), options.alpha, augment=False)
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
    """Measure the steps of both phases in interleaved rounds."""
    rounds = options.rounds or 9
    comparisons = []
    model = Model(backbone="MobileNetV2", weights=str(options.weights), alpha=options.alpha, image_size=IMAGE_SIZE)
    tf.config.experimental.enable_op_determinism()
    with open_photos(options) as root:
        dataset, pixels = open_training_images(select_all_for_training(root), IMAGE_SIZE, "memory")
        plain, augmented = (
            build_training_stream(pixels, BATCH_SIZE, kind) for kind in (Augmentation(), FLIP_ROTATE_ZOOM)
        )
        for thaw, phase in PHASES.items():
            step = build_step(model, len(dataset.class_names), thaw)
            sources = {
                "bare step": repeat_first_batch(plain),
                "bare step, float images": repeat_first_batch(augmented),
                "loop": iter(plain),
                "loop, augmented": iter(augmented),
            }
            steps_by_name: dict[str, Callable[[], object]] = {
                name: partial(step.run, batches, STEPS, 0, 0) for name, batches in sources.items()
            }
            steps_by_name[KERAS] = build_keras_step(options, len(dataset.class_names), thaw, repeat_first_batch(plain))
            speeds: dict[str, list[float]] = {name: [] for name in steps_by_name}
            for round_index in range(rounds + 1):
                for name, run_step in steps_by_name.items():
                    started_at = time.perf_counter()
                    run_step()
                    if round_index:  # the first round traces
                        speeds[name].append(BATCH_SIZE * STEPS / (time.perf_counter() - started_at))
            for name, against in RATIOS:
                comparisons.append(Comparison(f"{phase}: {name}", against, "images/s", speeds[name], speeds[against]))
        how = HOW.replace("\n", " ").format(
            steps=STEPS, data=describe_data(options, root), model=describe_model(options)
        )
    return Result(
        name=f"step-alpha-{options.alpha:g}",
        title=f"Training step, MobileNetV2 of width {options.alpha:g}",
        how=how,
        command=format_command("step", options, rounds),
        comparisons=comparisons,
    )


def main() -> None:
    """Measure the steps, and save the result."""
    options = make_argument_parser(__doc__).parse_args()
    save_result(measure(options), choose_output_folder(options))


if __name__ == "__main__":
    main()
