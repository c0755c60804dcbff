"""Measure one backbone: compute the features of all examples once, train a head per fold, and time a forward pass.

A classifier is a backbone, the pretrained network, with a head, the layers that compute the logits of the classes. Here
the whole backbone is frozen. The cut is the tensor at which the classifier is divided (`trainer.features.cut`): the
trunk, the frozen layers below it, computes the features of an image once, and only the tail, the layers above it with
the head, is run on them in training.
"""

import statistics
import time
from dataclasses import dataclass, replace

import numpy as np
import tensorflow as tf

from trainer.backbones.folds import FoldPlan
from trainer.backbones.results import FoldResult, Measurements
from trainer.cluster.devices import detect_device
from trainer.cluster.worker import Worker
from trainer.config.schema import Augmentation, RunConfig
from trainer.data.host import allocate_array
from trainer.data.images import ImageStore
from trainer.data.order import Order
from trainer.data.pipeline import build_training_batches
from trainer.data.sharding import UNSHARDED, count_steps_per_epoch
from trainer.data.splits import select_examples
from trainer.errors import DataError, Interrupted
from trainer.evaluation.scoring import Scorer, get_images_per_call
from trainer.features.compute import FeaturePass
from trainer.features.cut import Cut, Tail, Trunk
from trainer.features.inputs import FeatureCache
from trainer.features.plan import FeaturePlan, InputKind, divide_phases, plan_engines
from trainer.features.store import STORED_DTYPES, Features
from trainer.models.classifier import Classifier, count_parameters, count_variable_bytes
from trainer.models.freezing import set_trainable_layers
from trainer.monitoring.health import health
from trainer.monitoring.log import log
from trainer.training import variables
from trainer.training.optimizers import build_optimizer, build_schedule
from trainer.training.step import StepSettings, TrainingStep, require_finite
from trainer.types import Dataset

# Part of TensorFlow's warning about repeated tracing, which is intended: each fold's head has a new step function.
_RETRACING_WARNING = "triggered tf.function retracing"
WARM_UP_CALLS = 3  # calls before the timed ones; the first call compiles
MIN_REPEATS = 5  # minimum number of timed calls
MAX_REPEATS = 50  # maximum number of timed calls
MAX_SECONDS = 5.0  # once the timed calls have taken this long in total, no more than `MIN_REPEATS` calls are timed


@dataclass(frozen=True)
class FrozenBackbone:
    """A frozen backbone to measure, with a head that is trained per fold, and the cached features of all examples."""

    config: RunConfig  # with this backbone's `model` section, and one phase, which trains the head
    worker: Worker
    dataset: Dataset  # its train split pools the train and validation examples
    classifier: Classifier
    cut: Cut  # at the end of the trunk
    features: Features  # of all examples in the pool
    initial_head_values: dict[str, np.ndarray]  # of the head's variables, by name; each fold begins with them
    scorer: Scorer  # computes predictions from features


def ignore_retracing() -> None:
    """Suppress TensorFlow's warning that a function is traced repeatedly."""
    tf.get_logger().addFilter(lambda record: _RETRACING_WARNING not in str(record.msg))


def open_backbone(config: RunConfig, worker: Worker, images: ImageStore, classifier: Classifier) -> FrozenBackbone:
    """Compute the features of all images, or read them if an earlier comparison has stored them.

    The backbone is frozen because the only phase of `config` trains the head alone.

    Raises:
        DataError: an image cannot be read.
        Interrupted: there is no space for the features.
        StopRequested: after a signal.
    """
    (phase,) = config.phases
    divisions = divide_phases(config, classifier)
    cut = divisions[phase].cut
    assert cut is not None, "a frozen backbone has a cut"
    kinds: dict[str, InputKind] = {phase: "cached"}
    engines = plan_engines(
        config, detect_device(), images.dataset, classifier.image_size, divisions, {phase: False}, kinds
    )
    plan = FeaturePlan(divisions, kinds, {phase: engines[phase].engine})
    feature_pass = FeaturePass(worker, images, classifier, plan.engines[phase])
    cache = FeatureCache(feature_pass, plan, Scorer(worker, classifier))
    features_of_splits = cache.open(phase, ("train",))
    if features_of_splits is None:
        worker.stop.check("while features were computed")
        fix = "increase runtime.disk_budget_gb or runtime.memory_budget_gb, or set runtime.cache_dir"
        raise Interrupted(f"there is no space for the features of {classifier.spec.name}", fix=fix)
    return FrozenBackbone(
        config=config,
        worker=worker,
        dataset=images.dataset,
        classifier=classifier,
        cut=cut,
        features=features_of_splits[0],
        initial_head_values=variables.copy_values(classifier.head_variables),
        scorer=Scorer(worker, Tail(classifier, cut)),
    )


def train_and_score_fold(backbone: FrozenBackbone, fold_plan: FoldPlan, fold: int) -> FoldResult:
    """Train a head from its initial values on all folds except `fold`, and predict the examples of `fold`.

    The result does not depend on which folds were scored before.

    Raises:
        DataError: no example to train on, or no example of the fold, can be read.
        Diverged: the loss is not finite.
        StopRequested: after a signal.
    """
    train_indices, held_out_indices = fold_plan.get_indices(fold)
    started_at = time.perf_counter()
    head_variables = backbone.classifier.head_variables
    variables.assign_values(head_variables, backbone.initial_head_values, "the initial values")
    step = _train_head(backbone, select_features(backbone.features, train_indices, "train"))
    train_seconds = time.perf_counter() - started_at
    if step.averages:
        step.averages.swap()  # predict with the averaged weights (EMA)
    held_out_features = select_features(backbone.features, held_out_indices, "validation")
    predictions = backbone.scorer.score(held_out_features, backbone.config.training.batch_size, f"fold {fold + 1}")
    backbone.worker.stop.check("while a fold was scored")
    return FoldResult(held_out_indices[predictions.indices], predictions.probabilities.argmax(axis=1), train_seconds)


def select_features(features: Features, indices: np.ndarray, name: str) -> Features:
    """Copy the features of some examples into memory, as the features of a new split.

    Args:
        indices: example indices, int64 [k], increasing.
        name: name of the new split.
    """
    assert features.array is not None, "the features are complete"
    num_rows = len(indices) + 1  # the last row is padding
    array = allocate_array((num_rows, *features.shape), STORED_DTYPES[features.dtype])
    array[: len(indices)] = features.array[indices]
    new_index = {int(index): i for i, index in enumerate(indices)}
    return Features(
        split=replace(select_examples(features.split, indices), name=name),
        shape=features.shape,
        dtype=features.dtype,
        views=1,
        indices=np.arange(len(indices), dtype=np.int64),
        threads=features.threads,
        log_message=log.info,
        array=array,
        unreadable={new_index[index]: reason for index, reason in features.unreadable.items() if index in new_index},
    )


def _train_head(backbone: FrozenBackbone, features: Features) -> TrainingStep:
    """Train the head for the full length of the phase. Return the training step, which has the EMA weights."""
    config, worker, strategy = backbone.config, backbone.worker, backbone.worker.strategy
    ((phase_name, phase),) = config.phases.items()
    batch_size = config.training.batch_size
    split = features.split
    steps_per_epoch = count_steps_per_epoch(split, batch_size)
    total_steps = config.count_phase_steps(phase, steps_per_epoch)
    if len(features.unreadable) == split.count:
        reason = next(iter(features.unreadable.values()))
        raise DataError(f"no training example of a fold could be read, the first: {reason}", fix="repair the images")
    freezing = set_trainable_layers(backbone.classifier, phase.thaw, phase.batch_norm)
    schedule = build_schedule(
        phase.schedule, phase.optimizer.learning_rate, total_steps=total_steps, steps_per_epoch=steps_per_epoch,
        batch_size=batch_size,
    )  # fmt: skip
    with strategy.scope():
        optimizer = build_optimizer(phase.optimizer, schedule)
    fold_data = replace(backbone.dataset, splits={"train": split})
    settings = StepSettings.from_config(config, fold_data, batch_norm_training=False, xla=False)
    tail = Tail(backbone.classifier, backbone.cut)
    step = TrainingStep(strategy, tail, freezing.trainable, optimizer, settings, should_stop=worker.stop_requested)
    order = Order(batch_size=batch_size, seed=config.seed, window=config.data.shuffle_window, first_epoch=0,
                  first_step=0, sharding=UNSHARDED)  # fmt: skip
    batches = build_training_batches(features, order, num_replicas=worker.replicas, augmentation=Augmentation())
    iterator = iter(strategy.distribute_datasets_from_function(lambda _: batches.dataset))
    num_steps = 0
    while num_steps < total_steps:
        call_steps = min(config.runtime.steps_per_call, total_steps - num_steps)
        # The head is trained in one phase, so that the steps of the run are those of the phase.
        sums, _, _ = step.run(iterator, call_steps, run_step=num_steps, phase_step=num_steps)
        num_steps += len(sums)
        require_finite(sums, num_steps, phase_name, (num_steps - 1) // steps_per_epoch + 1)
        health.record_progress(num_steps, total_steps)
        worker.stop.check("while a head was trained")
    return step


def measure_size_and_speed(backbone: FrozenBackbone, machine: str) -> Measurements:
    """Count the parameters and bytes of a backbone with its head, and time its forward pass on this machine.

    Args:
        machine: description of the device and CPU cores, which is stored with the times.

    Raises:
        StopRequested: after a signal.
    """
    classifier = backbone.classifier
    batch_size = get_images_per_call()
    trunk = Trunk(classifier, [backbone.cut])

    @tf.function(autograph=False)
    def predict(images: tf.Tensor) -> tf.Tensor:
        (features,) = trunk.features(images)
        return tf.nn.softmax(classifier.head_logits(features))

    def time_pass_ms(num_images: int) -> float:
        """Return the median time of a forward pass of `num_images` images in one batch, in milliseconds."""
        size = classifier.image_size
        pixels = np.random.default_rng(0).integers(0, 256, (num_images, size, size, 3), np.uint8)
        images = tf.constant(pixels)
        seconds: list[float] = []  # of each timed call
        for _ in range(WARM_UP_CALLS):
            predict(images).numpy()
        while len(seconds) < MIN_REPEATS or (len(seconds) < MAX_REPEATS and sum(seconds) < MAX_SECONDS):
            started_at = time.perf_counter()
            predict(images).numpy()  # waits for the device
            seconds.append(time.perf_counter() - started_at)
            backbone.worker.stop.check("while a network was timed")
        return 1e3 * statistics.median(seconds)

    weights = list(classifier.variables.values())
    return Measurements(
        image_size=classifier.image_size, parameters=count_parameters(weights), bytes=count_variable_bytes(weights),
        single_ms=time_pass_ms(1), batch_ms=time_pass_ms(batch_size) / batch_size, batch_rows=batch_size,
        machine=machine,
    )  # fmt: skip
