"""Measure the training step of one network in this process: `python -m benchmarks.gpu_step SETTINGS`.

`benchmarks.gpu` runs this module. SETTINGS is a JSON object with the fields of `Settings`. The last line of the output
is a JSON object with the result.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from benchmarks.arguments import FLIP_ROTATE_ZOOM, select_all_for_training
from benchmarks.pipelines import build_training_stream, open_training_images
from trainer.cli.compose import compose
from trainer.cluster.devices import DTYPE_POLICIES, detect_device, set_thread_pools
from trainer.config.auto import resolve_auto
from trainer.config.schema import Augmentation, RunConfig, validate_config
from trainer.data.host import count_usable_cpus
from trainer.data.pipeline import prefetch_to_device
from trainer.models.backbones import find_backbone
from trainer.models.classifier import build_classifier
from trainer.models.freezing import set_trainable_layers
from trainer.models.gradients import find_differentiated_operations
from trainer.planning.computation import PhaseWorkload, decide_computation
from trainer.training.optimizers import build_optimizer, build_schedule
from trainer.training.step import StepSettings, TrainingStep

STEPS, CLASSES = 20, 101  # optimizer steps per call of the compiled function; classes of the network
PIPELINES = {"decoded in memory": ("memory", False), "decoded anew": ("none", False), "augmented": ("memory", True)}
MANY_IMAGES = 10**9  # so many that XLA is chosen wherever it makes the step faster


@dataclass(frozen=True)
class Settings:
    """A measurement. `photos` is a folder of class folders for measuring our step with the input pipeline, or None."""

    implementation: str  # ours | keras
    backbone: str
    side: int
    batch: int
    thaw: str  # all | none
    seconds: float
    photos: str | None = None


def configure(settings: Settings) -> RunConfig:
    """Resolve the configuration of `runtime=gpu` for this machine's device, and set TensorFlow's options."""
    phases = {"all": "end_to_end", "none": "head_only"}[settings.thaw]
    requested = validate_config(compose([
        "data=digits", f"phases={phases}", "runtime=gpu", f"training.batch_size={settings.batch}", "model.weights=none",
        f"model.backbone={settings.backbone}", f"model.image_size={settings.side}",
    ]) or {})  # fmt: skip
    config, _ = resolve_auto(requested, MANY_IMAGES, CLASSES, detect_device())
    set_thread_pools(count_usable_cpus())
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    keras.mixed_precision.set_global_policy(DTYPE_POLICIES[config.runtime.precision])
    return config


def make_batch(settings: Settings) -> dict[str, np.ndarray]:
    """Make a batch of random images and labels."""
    rng, rows = np.random.default_rng(0), np.arange(settings.batch, dtype=np.int64)
    images = rng.integers(0, 255, (settings.batch, settings.side, settings.side, 3), np.uint8)
    labels = rng.integers(0, CLASSES, settings.batch).astype(np.int32)
    return {"image": images, "label": labels, "weight": np.ones(settings.batch, np.float32), "index": rows,
            "position": rows}  # fmt: skip


def to_device(batches: tf.data.Dataset) -> Iterator[Any]:
    """Iterate over batches, prefetched to the GPU as in a run."""
    return iter(prefetch_to_device(batches, "GPU:0") if detect_device().kind == "GPU" else batches)


def measure_calls(call: Callable[[], object], images: int, seconds: float) -> dict[str, Any]:
    """Measure the images per second of `call`, and the duration of its first call, which compiles.

    The second call is not measured, either. `images` is the number of images per call.
    """
    started_at = time.perf_counter()
    call()
    first_call_seconds, speeds = time.perf_counter() - started_at, list[float]()
    call()
    end = time.perf_counter() + seconds
    while not speeds or time.perf_counter() < end:
        started_at = time.perf_counter()
        call()
        speeds.append(images / (time.perf_counter() - started_at))
    return {
        "images_per_second": statistics.median(speeds),
        "range": [min(speeds), max(speeds)],
        "first_call": first_call_seconds,
    }


def measure_ours(settings: Settings, config: RunConfig) -> dict[str, Any]:
    """Measure the step of a run on one batch in memory and, with `settings.photos`, with the input pipeline."""
    tf.config.experimental.enable_op_determinism()
    ((name, phase),) = config.phases.items()
    classifier = build_classifier(config.model, CLASSES, 1)
    plan = set_trainable_layers(classifier, phase.thaw, phase.batch_norm)
    workload = PhaseWorkload(
        MANY_IMAGES, len(classifier.backbone.layers), find_differentiated_operations(classifier.backbone)
    )
    computation = decide_computation(config, name, detect_device(), workload)
    schedule = build_schedule(phase.schedule, 1e-5, total_steps=1, steps_per_epoch=1, batch_size=1)
    step = TrainingStep(
        tf.distribute.get_strategy(), classifier, plan.trainable, build_optimizer(phase.optimizer, schedule),
        StepSettings(seed=1, xla=computation.xla, loss_scaling=config.runtime.precision == "float16",
                     polls_each_step=detect_device().kind == "CPU"),
    )  # fmt: skip
    images = settings.batch * STEPS

    def measure(batches: tf.data.Dataset) -> dict[str, Any]:
        source = to_device(batches)
        return measure_calls(lambda: step.run(source, STEPS, 0, 0), images, settings.seconds)

    bare = tf.data.Dataset.from_tensors(make_batch(settings)).repeat()
    result = measure(bare) | {"xla": computation.xla, "reason": computation.reason, "fed": {}}
    for kind, (cache, augmented) in PIPELINES.items() if settings.photos else ():
        _, pixels = open_training_images(select_all_for_training(Path(str(settings.photos))), settings.side, cache)  # type: ignore[arg-type]
        augmentation = FLIP_ROTATE_ZOOM if augmented else Augmentation()
        pipeline_speed = measure(build_training_stream(pixels, settings.batch, augmentation))["images_per_second"]
        result["fed"][kind] = pipeline_speed / measure(bare)["images_per_second"]  # the bare step again, right after it
    return result


class EpochTimer(keras.callbacks.Callback):
    """Measures the epochs of `fit`, and ends it after `seconds` of epochs, without the first two."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.epoch_seconds = seconds, list[float]()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        self.started_at = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        self.epoch_seconds.append(time.perf_counter() - self.started_at)
        if len(self.epoch_seconds) > 2 and sum(self.epoch_seconds[2:]) > self.seconds:
            self.model.stop_training = True


def measure_keras(settings: Settings) -> dict[str, Any]:
    """Measure `fit` of the same network and layers, with `jit_compile` on GPUs, and not deterministic."""
    spec, xla = find_backbone(settings.backbone), detect_device().kind == "GPU"
    backbone = spec.build(settings.side, None, None)
    backbone.trainable = settings.thaw == "all"
    for layer in backbone.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False
    inputs = keras.Input((settings.side, settings.side, 3))
    features = keras.layers.GlobalAveragePooling2D()(backbone(spec.preprocess(inputs), training=False))
    model = keras.Model(inputs, keras.layers.Dense(CLASSES, activation="softmax", dtype="float32")(features))
    model.compile(keras.optimizers.Adam(1e-5), loss="sparse_categorical_crossentropy", steps_per_execution=STEPS,
                  jit_compile=xla)  # fmt: skip
    batch, epochs = make_batch(settings), EpochTimer(settings.seconds)
    batches = tf.data.Dataset.from_tensors((batch["image"].astype(np.float32), batch["label"])).repeat().prefetch(2)
    model.fit(batches, steps_per_epoch=STEPS, epochs=10_000, verbose=0, callbacks=[epochs])
    speeds = [settings.batch * STEPS / seconds for seconds in epochs.epoch_seconds[2:]]
    return {"images_per_second": statistics.median(speeds), "range": [min(speeds), max(speeds)],
            "first_call": epochs.epoch_seconds[0], "xla": xla, "fed": {}}  # fmt: skip


def main() -> None:
    """Measure the step that the argument describes, and print the result as JSON."""
    settings = Settings(**json.loads(sys.argv[1]))
    config = configure(settings)
    result = measure_ours(settings, config) if settings.implementation == "ours" else measure_keras(settings)
    device = detect_device()
    peak = tf.config.experimental.get_memory_info("GPU:0")["peak"] if device.kind == "GPU" else None
    result |= {"peak_memory": peak, "precision": config.runtime.precision, "device": asdict(device)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
