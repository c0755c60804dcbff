"""Measure one training step in this process, for `benchmarks.gpu`: python -m benchmarks.gpu_step SETTINGS (JSON).

Prints a JSON object as its last line.
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

from benchmarks.arguments import FLIP_ROTATE_ZOOM, all_to_train
from benchmarks.pipelines import open_training, stream
from trainer.cli.compose import compose
from trainer.cluster.devices import DTYPE_POLICIES, detect_device, set_thread_pools
from trainer.config.auto import resolve_auto
from trainer.config.schema import Augmentation, RunConfig, load
from trainer.data.host import count_usable_cpus
from trainer.data.pipeline import prefetch_to_device
from trainer.models.backbones import find_backbone
from trainer.models.classifier import build_classifier
from trainer.models.freezing import set_trainable_layers
from trainer.models.gradients import find_differentiated_operations
from trainer.planning.computation import PhaseWorkload, decide_computation
from trainer.training.optimizers import build_optimizer, build_schedule
from trainer.training.step import StepSettings, TrainingStep

STEPS, CLASSES = 20, 101  # per call
FED = {"decoded in memory": ("memory", False), "decoded anew": ("none", False), "augmented": ("memory", True)}
MANY_IMAGES = 10**9  # so that compiling pays


@dataclass(frozen=True)
class Settings:
    """One measurement. `photos` is a folder of class folders: then our step is also fed by the pipeline of a run."""

    implementation: str  # ours | keras
    backbone: str
    side: int
    batch: int
    thaw: str  # all | none
    seconds: float
    photos: str | None = None


def configure(settings: Settings) -> RunConfig:
    """Resolve the settings of `runtime=gpu` for the device of this machine, and prepare TensorFlow."""
    phases = {"all": "end_to_end", "none": "head_only"}[settings.thaw]
    requested = load(compose([
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
    """A batch of noise."""
    rng, rows = np.random.default_rng(0), np.arange(settings.batch, dtype=np.int64)
    images = rng.integers(0, 255, (settings.batch, settings.side, settings.side, 3), np.uint8)
    labels = rng.integers(0, CLASSES, settings.batch).astype(np.int32)
    return {"image": images, "label": labels, "weight": np.ones(settings.batch, np.float32), "index": rows,
            "position": rows}  # fmt: skip


def to_device(batches: tf.data.Dataset) -> Iterator[Any]:
    """Iterate over batches as a run does."""
    return iter(prefetch_to_device(batches, "GPU:0") if detect_device().kind == "GPU" else batches)


def measure_calls(call: Callable[[], object], images: int, seconds: float) -> dict[str, Any]:
    """Images per second of a call, after the first one, which compiles, and the second."""
    began = time.perf_counter()
    call()
    first, speeds = time.perf_counter() - began, list[float]()
    call()
    end = time.perf_counter() + seconds
    while not speeds or time.perf_counter() < end:
        began = time.perf_counter()
        call()
        speeds.append(images / (time.perf_counter() - began))
    return {"images_per_second": statistics.median(speeds), "range": [min(speeds), max(speeds)], "first_call": first}


def measure_ours(settings: Settings, config: RunConfig) -> dict[str, Any]:
    """Measure the step of a run, on one batch in memory and, with `photos`, on batches of the pipeline."""
    tf.config.experimental.enable_op_determinism()
    ((name, phase),) = config.phases.items()
    classifier = build_classifier(config.model, CLASSES, 1)
    plan = set_trainable_layers(classifier, phase.thaw, phase.batch_norm)
    facts = PhaseWorkload(
        MANY_IMAGES, len(classifier.backbone.layers), find_differentiated_operations(classifier.backbone)
    )
    computation = decide_computation(config, name, detect_device(), facts)
    rate = build_schedule(phase.schedule, 1e-5, total_steps=1, steps_per_epoch=1, batch_size=1)
    step = TrainingStep(
        tf.distribute.get_strategy(), classifier, plan.trainable, build_optimizer(phase.optimizer, rate),
        StepSettings(seed=1, xla=computation.xla, loss_scaling=config.runtime.precision == "float16",
                     polls_each_step=detect_device().kind == "CPU"),
    )  # fmt: skip
    images = settings.batch * STEPS

    def measure(batches: tf.data.Dataset) -> dict[str, Any]:
        source = to_device(batches)
        return measure_calls(lambda: step.run(source, STEPS, 0, 0), images, settings.seconds)

    bare = tf.data.Dataset.from_tensors(make_batch(settings)).repeat()
    result = measure(bare) | {"xla": computation.xla, "reason": computation.reason, "fed": {}}
    for kind, (cache, augmented) in FED.items() if settings.photos else ():
        _, pixels = open_training(all_to_train(Path(str(settings.photos))), settings.side, cache)  # type: ignore[arg-type]
        augmentation = FLIP_ROTATE_ZOOM if augmented else Augmentation()
        fed = measure(stream(pixels, settings.batch, augmentation))["images_per_second"]
        result["fed"][kind] = fed / measure(bare)["images_per_second"]  # the bare step again, right after it
    return result


class Epochs(keras.callbacks.Callback):
    """Times epochs of `fit`, and ends it after some seconds of measured epochs."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.measured = seconds, list[float]()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        self.began = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        self.measured.append(time.perf_counter() - self.began)
        if len(self.measured) > 2 and sum(self.measured[2:]) > self.seconds:
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
    batch, epochs = make_batch(settings), Epochs(settings.seconds)
    batches = tf.data.Dataset.from_tensors((batch["image"].astype(np.float32), batch["label"])).repeat().prefetch(2)
    model.fit(batches, steps_per_epoch=STEPS, epochs=10_000, verbose=0, callbacks=[epochs])
    speeds = [settings.batch * STEPS / seconds for seconds in epochs.measured[2:]]
    return {"images_per_second": statistics.median(speeds), "range": [min(speeds), max(speeds)],
            "first_call": epochs.measured[0], "xla": xla, "fed": {}}  # fmt: skip


def main() -> None:
    settings = Settings(**json.loads(sys.argv[1]))
    config = configure(settings)
    result = measure_ours(settings, config) if settings.implementation == "ours" else measure_keras(settings)
    device = detect_device()
    peak = tf.config.experimental.get_memory_info("GPU:0")["peak"] if device.kind == "GPU" else None
    result |= {"peak_memory": peak, "precision": config.runtime.precision, "device": asdict(device)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
