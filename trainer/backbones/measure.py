"""Measure one backbone: compute the features of all examples once, train a head per fold, and time a forward pass."""

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
MIN_REPEATS, MAX_REPEATS = 5, 50  # minimum and maximum number of timed calls
MAX_SECONDS = 5.0  # after this total time, no further call is timed, except for `MIN_REPEATS` calls


@dataclass(frozen=True)
class Network:
    """A backbone to measure: frozen, with a head that is trained per fold, and the cached features of all examples."""

    config: RunConfig  # with this backbone's `model` section, and one phase, which trains the head
    worker: Worker
    dataset: Dataset  # its train split pools the train and validation examples
    classifier: Classifier
    cut: Cut
    features: Features  # of all examples in the pool
    initial_values: dict[str, np.ndarray]  # of the head's variables, by name
    scorer: Scorer  # computes predictions from features


def ignore_retracing() -> None:
    """Suppress TensorFlow's warning that a function is traced repeatedly."""
    tf.get_logger().addFilter(lambda record: _RETRACING_WARNING not in str(record.msg))


def open_network(config: RunConfig, worker: Worker, images: ImageStore, classifier: Classifier) -> Network:
    """Freeze the backbone, and compute the features of all images, or read them if an earlier start has stored them.

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
    initial_values = variables.copy_values(classifier.head_variables)
    scorer = Scorer(worker, Tail(classifier, cut))
    return Network(config, worker, images.dataset, classifier, cut, features_of_splits[0], initial_values, scorer)


def score_fold(network: Network, folds: FoldPlan, fold: int) -> FoldResult:
    """Train a head from its initial values on all folds except `fold`, and predict the examples of `fold`.

    The result does not depend on which folds were scored before.

    Raises:
        DataError: no example to train on, or no example of the fold, can be read.
        Diverged: the loss is not finite.
        StopRequested: after a signal.
    """
    classifier, training = network.classifier, network.config.training
    train_indices, held_out_indices = folds.get_indices(fold)
    start = time.perf_counter()
    variables.assign_values(classifier.head_variables, network.initial_values, "the initial values")
    step = _train_head(network, select_features(network.features, train_indices, "train"))
    seconds = time.perf_counter() - start
    if step.averages:
        step.averages.swap()  # predict with the averaged weights (EMA)
    held_out = select_features(network.features, held_out_indices, "validation")
    predictions = network.scorer.score(held_out, training.batch_size, f"fold {fold + 1}")
    network.worker.stop.check("while a fold was scored")
    return FoldResult(held_out_indices[predictions.indices], predictions.probabilities.argmax(axis=1), seconds)


def select_features(features: Features, indices: np.ndarray, name: str) -> Features:
    """Copy the features of some examples into memory, as the features of a new split.

    Args:
        indices: example indices, int64 [k], increasing.
        name: name of the new split.
    """
    assert features.array is not None, "the features are complete"
    array = allocate_array(
        (len(indices) + 1, *features.shape), STORED_DTYPES[features.dtype]
    )  # the last row is padding
    array[: len(indices)] = features.array[indices]
    new_index = {int(index): i for i, index in enumerate(indices)}
    return Features(
        replace(select_examples(features.split, indices), name=name), features.shape, features.dtype, 1,
        np.arange(len(indices), dtype=np.int64), features.threads, log.info, array=array,
        unreadable={new_index[index]: reason for index, reason in features.unreadable.items() if index in new_index},
    )  # fmt: skip


def _train_head(network: Network, features: Features) -> TrainingStep:
    """Train the head for the full length of the phase. Return the training step, which has the EMA weights."""
    config, worker, strategy = network.config, network.worker, network.worker.strategy
    ((name, phase),) = config.phases.items()
    batch_size, split = config.training.batch_size, features.split
    per_epoch = count_steps_per_epoch(split, batch_size)
    total = config.phase_steps(phase, per_epoch)
    if len(features.unreadable) == split.count:
        reason = next(iter(features.unreadable.values()))
        raise DataError(f"no training example of a fold could be read, the first: {reason}", fix="repair the images")
    freezing = set_trainable_layers(network.classifier, phase.thaw, phase.batch_norm)
    rate = phase.optimizer.learning_rate
    schedule = build_schedule(phase.schedule, rate, total_steps=total, steps_per_epoch=per_epoch, batch_size=batch_size)
    with strategy.scope():
        optimizer = build_optimizer(phase.optimizer, schedule)
    fold_data = replace(network.dataset, splits={"train": split})
    settings = StepSettings.from_config(config, fold_data, batch_norm_training=False, xla=False)
    tail, stop = Tail(network.classifier, network.cut), worker.stop_requested
    step = TrainingStep(strategy, tail, freezing.trainable, optimizer, settings, should_stop=stop)
    order = Order(batch_size=batch_size, seed=config.seed, window=config.data.shuffle_window, first_epoch=0,
                  first_step=0, sharding=UNSHARDED)  # fmt: skip
    batches = build_training_batches(features, order, replicas=worker.replicas, augmentation=Augmentation())
    iterator = iter(strategy.distribute_datasets_from_function(lambda _: batches.dataset))
    num_steps = 0
    while num_steps < total:
        sums, _, _ = step.run(iterator, min(config.runtime.steps_per_call, total - num_steps), num_steps, num_steps)
        num_steps += len(sums)
        require_finite(sums, num_steps, name, (num_steps - 1) // per_epoch + 1)
        health.record_progress(num_steps, total)
        worker.stop.check("while a head was trained")
    return step


def measure(network: Network, machine: str) -> Measurements:
    """Count the parameters and bytes of a backbone with its head, and time its forward pass on this machine.

    Args:
        machine: description of the device and CPU cores, which is stored with the times.

    Raises:
        StopRequested: after a signal.
    """
    classifier, num_rows = network.classifier, get_images_per_call()
    trunk = Trunk(classifier, [network.cut])

    @tf.function(autograph=False)
    def predict(images: tf.Tensor) -> tf.Tensor:
        (features,) = trunk.features(images)
        return tf.nn.softmax(classifier.head_logits(features))

    def time_pass_ms(count: int) -> float:
        """Return the median time of a forward pass of `count` images."""
        size = classifier.image_size
        pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
        images, seconds = tf.constant(pixels), list[float]()
        for _ in range(WARM_UP_CALLS):
            predict(images).numpy()
        while len(seconds) < MIN_REPEATS or (len(seconds) < MAX_REPEATS and sum(seconds) < MAX_SECONDS):
            start = time.perf_counter()
            predict(images).numpy()  # waits for the device
            seconds.append(time.perf_counter() - start)
            network.worker.stop.check("while a network was timed")
        return 1e3 * statistics.median(seconds)

    weights = list(classifier.variables.values())
    return Measurements(
        image_size=classifier.image_size, parameters=count_parameters(weights), bytes=count_variable_bytes(weights),
        single_ms=time_pass_ms(1), batch_ms=time_pass_ms(num_rows) / num_rows, batch_rows=num_rows, machine=machine,
    )  # fmt: skip
