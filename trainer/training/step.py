"""The compiled training step.

The loss of a step is one mean over the global batch, sum(loss * weight) / sum(weight), where `weight` is 1 for an
example and 0 for padding. It depends neither on padding nor on how the examples are distributed over replicas.
Therefore replicas all-reduce the sum of weights before they compute gradients. The same all-reduce sums the stop flags
of the workers, so that all workers stop after the same step.

`TrainingStep.run` executes several steps in one compiled loop (`_loop`). `_terms` computes the forward and the backward
pass: the gradients and the sums for metrics, which a step adds up over micro-batches and replicas.

With virtual replicas (VirtualFlow, Or et al. 2022), a global batch consists of a fixed number of equal parts, whatever
the number of replicas. Sums over the parts are added in one binary tree, first within a replica, then over the
replicas, so that rounding does not depend on the number of replicas.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

from trainer.config.schema import RunConfig
from trainer.errors import Diverged
from trainer.private_api import advance_function_numbers, all_to_all
from trainer.training.losses import (
    LossSettings,
    compute_class_weights,
    compute_divergence_threshold,
    compute_example_accuracy,
    compute_weighted_losses,
    safe_log,
)
from trainer.training.variables import assign_values, collect_optimizer_variables, copy_values
from trainer.types import Batch, Dataset

CALL_SECONDS = 2.0  # approximate maximum length of a device call that checks for a stop request only at its start
# Distance between the function numbers of two phases: more functions than a process traces before or in a phase.
FUNCTIONS_PER_PHASE = 1_000_000
INITIAL_LOSS_SCALE, LOSS_SCALE_GROWTH_STEPS = 2.0**15, 2000  # as in `keras.optimizers.LossScaleOptimizer`


class Network(Protocol):
    """The network that a step trains: a `Classifier` on images, or its `Tail` on cached features."""

    def logits(
        self, images: Any, *, training: bool = False, batch_norm_training: bool = False, seed: int = 0, step: Any = 0,
        position: Any = None, weight: Any = None,
    ) -> Any:  # fmt: skip
        """Compute logits, float32 [b, classes], of images [b, S, S, 3] in 0..255, or of cached features.

        Args:
            training: apply dropout, and use batch statistics in the head's normalization layers.
            batch_norm_training: use batch statistics in the backbone's trainable normalization layers.
            seed, step: dropout depends on the seed and on the step of the run.
            position: positions of the examples in the global batch, int64 [b]; dropout depends on them.
            weight: 1 for an example and 0 for padding, float32 [b]; padding is excluded from batch statistics.
        """

    def l2_loss(self) -> tf.Tensor:
        """Return the L2 penalty on the head, a float32 scalar."""

    @property
    def statistics_sizes(self) -> dict[str, int]:
        """The number of values that `collect_statistics` collects for each normalization layer, by layer name."""

    def collect_statistics(self) -> AbstractContextManager[dict[str, Any]]:
        """Make `logits` normalize by the statistics of its batch, and collect their sums by layer, float32 [n]."""

    def update_moving_averages(self, strategy: tf.distribute.Strategy, sums: Mapping[str, Any]) -> None:
        """Update the moving averages from `sums` by layer, equal on all replicas. Call in cross-replica context."""


@dataclass(frozen=True, kw_only=True)
class StepSettings(LossSettings):
    """Settings of a training step, in addition to those of its loss."""

    seed: int
    clip_norm: float | None = None  # maximum global norm of the gradients; None if they are not clipped
    accumulate: int = 1  # micro-batches per step on each replica
    virtual_replicas: int | None = None  # number of equal parts of a global batch, a power of two
    ema: float | None = None  # decay of the moving averages of the weights; None if there are no averages
    batch_norm_training: bool = False  # whether trainable BatchNormalization layers use batch statistics
    loss_scaling: bool = False  # dynamic loss scaling, for float16
    xla: bool = False  # compile the forward and backward pass with XLA; collectives and the optimizer stay outside
    polls_each_step: bool = True  # whether to check for a stop request at each step, not only once per device call
    phase: int = 0  # index of the phase; with `xla`, it makes the names of compiled functions equal in each start

    @classmethod
    def from_config(
        cls, config: RunConfig, dataset: Dataset, batch_norm_training: bool, xla: bool, polls_each_step: bool = True,
        phase: int = 0,
    ) -> StepSettings:  # fmt: skip
        """Make a phase's settings from the configuration and the training split's class counts."""
        training, distillation = config.training, config.distillation
        options = {"alpha": distillation.alpha, "temperature": distillation.temperature} if distillation else {}
        return cls(
            seed=config.seed,
            label_smoothing=training.label_smoothing,
            focal_gamma=training.focal_gamma if training.loss == "focal" else None,
            class_weights=compute_class_weights(
                training.class_weights, dataset.class_names, dataset.splits["train"].labels
            ),
            clip_norm=training.clip_norm,
            accumulate=training.accumulate,
            virtual_replicas=training.virtual_replicas,
            ema=training.ema,
            batch_norm_training=batch_norm_training,
            loss_scaling=config.runtime.precision == "float16",
            xla=xla,
            polls_each_step=polls_each_step,
            phase=phase,
            **options,
        )


def require_finite(sums: np.ndarray, step: int, phase: str, epoch: int) -> None:
    """Raise `Diverged` unless all sums are finite.

    Args:
        sums: the sums that `TrainingStep.run` returned for the last n steps, float32 [n, 3].
        step: number of the last of these steps, counted from 1 over the run.
        phase, epoch: name of the phase and number of the epoch, for the message.
    """
    if not np.isfinite(sums).all():
        first_step = step - len(sums) + 1 + int(np.argmax(~np.isfinite(sums).all(-1)))
        raise _make_divergence_error("loss", "not finite", first_step, phase, epoch)


def require_plausible(
    losses: Mapping[str, float], settings: LossSettings, *, num_classes: int, step: int, phase: str, epoch: int
) -> None:
    """Raise `Diverged` if a mean loss exceeds `compute_divergence_threshold`, or is not finite.

    `losses` contains mean losses by name. The one named "val_loss" is the validation loss, which has neither class
    weights nor distillation. `num_classes` is the number of classes. `step`, `phase` and `epoch` are for the message.
    """
    for name, loss in losses.items():
        limit = compute_divergence_threshold(LossSettings() if name == "val_loss" else settings, num_classes)
        if not loss <= limit:  # also true for NaN
            loss_name = "validation loss" if name == "val_loss" else "loss"
            if not np.isfinite(loss):
                raise _make_divergence_error(loss_name, "not finite", step, phase, epoch)
            reason = f": at most {limit:,.0f} is plausible for {num_classes} classes (docs/training.md)"
            raise _make_divergence_error(loss_name, f"{loss:,.0f}", step, phase, epoch, reason)


def _make_divergence_error(loss_name: str, value: str, step: int, phase: str, epoch: int, reason: str = "") -> Diverged:
    """Build an error about the `value` of a loss at a step; `reason` ends the sentence."""
    fix = f"lower phases.{phase}.optimizer.learning_rate, or set training.clip_norm=1"
    return Diverged(f"the {loss_name} is {value} at step {step} (phase {phase}, epoch {epoch}){reason}", fix=fix)


@dataclass
class WeightAverages:
    """Exponential moving averages (EMA) of the trained weights."""

    shadows: dict[str, tf.Variable]  # the averages, by name of the weight
    weights: dict[str, keras.Variable]  # the trained weights, by name

    def swap(self) -> None:
        """Exchange the values of averages and weights. A second call exchanges them back."""
        average_values, weight_values = copy_values(self.shadows), copy_values(self.weights)
        assign_values(self.weights, average_values, "the averages")
        assign_values(self.shadows, weight_values, "the weights")


def _call_on_host(function: Callable[[], float], after: Sequence[tf.Tensor] = ()) -> tf.Tensor:
    """Add an operation to the graph that calls a Python function once the tensors in `after` are on the host.

    Returns the function's result, a float64 scalar.
    """
    result = tf.numpy_function(lambda *_: np.float64(function()), list(after), tf.float64)
    result.set_shape([])
    return result


def _all_reduce(values: Any, num_replicas: int) -> Any:
    """Sum values over all replicas. Must be called in replica context."""
    if num_replicas == 1:
        return values
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, values)


def _add_in_tree(rows: tf.Tensor) -> tf.Tensor:
    """Add up the rows of a tensor [n, k], where n is a power of two, in a binary tree: pairs of neighbors first."""
    while rows.shape[0] > 1:
        rows = rows[0::2] + rows[1::2]
    return rows[0]


class TrainingStep:
    """Runs training steps, several per device call, under any distribution strategy."""

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        network: Network,
        trainable_variables: dict[str, keras.Variable],
        optimizer: keras.optimizers.Optimizer,
        settings: StepSettings,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        teacher: Callable[[Any], Any] | None = None,
    ) -> None:
        """Create the variables of the optimizer, the averages and the loss scale in the strategy's scope.

        Args:
            strategy: distributes the step over replicas.
            network: computes the logits and the L2 penalty.
            trainable_variables: the network's trainable variables by name; the optimizer updates no others.
            optimizer: the optimizer, which is built here for the variables in `trainable_variables`.
            settings: settings of the step and its loss.
            should_stop: returns whether this worker is requested to stop. Called at each step, in a TensorFlow thread.
                If it returns true on any worker, all workers stop after that step. Without `polls_each_step`, it is
                called only before the first step of a device call, and the device does not wait for the host between
                steps. The steps per call then depend on this process's speed, so several workers must poll each step.
            teacher: computes logits, float32 [b, classes], of the images of each step, without gradients. None if the
                batches have soft labels, or if there is no distillation.
        """
        self.strategy, self.network, self.optimizer, self.teacher = strategy, network, optimizer, teacher
        self.variables, self.settings, self.should_stop = list(trainable_variables.values()), settings, should_stop
        self.replicas = strategy.num_replicas_in_sync  # total number on all workers
        self.is_multi_worker = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
        # Devices of this worker.
        local_devices: tuple[str, ...] = strategy.extended.worker_devices if self.is_multi_worker else ()
        # How `_add_replicas_in_tree` sums vectors over the replicas.
        self.exchanges_slices = len(local_devices) == 1 and "GPU" not in local_devices[0]
        parts = settings.virtual_replicas
        self.micro_batches = parts // self.replicas if parts else settings.accumulate  # number per step on each replica
        # Name of each layer whose statistics are collected -> number of values.
        self.statistics_sizes = network.statistics_sizes if parts else {}
        with strategy.scope():
            optimizer.build(self.variables)
            self.loss_scale: list[tf.Variable] | None = None  # float32 scalars: scale, consecutive finite steps
            if settings.loss_scaling:
                self.loss_scale = [tf.Variable(value, trainable=False) for value in (INITIAL_LOSS_SCALE, 0.0)]
            self.averages: WeightAverages | None = None
            if settings.ema:
                initial_values = copy_values(trainable_variables)
                shadows = {name: tf.Variable(value, trainable=False) for name, value in initial_values.items()}
                self.averages = WeightAverages(shadows, trainable_variables)
        self.traced = False  # whether `run` has been called; the first call traces and compiles
        self._steps_per_call = 1  # limit without `polls_each_step`: as many steps as take `CALL_SECONDS`
        self._compiled_loop = tf.function(self._loop, autograph=False)
        self._replica_terms: Callable[..., list[tf.Tensor]] = self._terms
        if settings.xla:
            compiled = tf.function(self._terms, jit_compile=True, autograph=False)
            # A lambda, because for a bare tf.function `strategy.run` would trace one function for all replicas.
            self._replica_terms = lambda *arguments: compiled(*arguments)

    def checkpoint_variables(self) -> dict[str, Any]:
        """Return the variables of optimizer, averages and loss scale, by their names in checkpoints."""
        shadows = {f"ema/{name}": shadow for name, shadow in self.averages.shadows.items()} if self.averages else {}
        scale = {f"loss_scale/{i}": variable for i, variable in enumerate(self.loss_scale or [])}
        return collect_optimizer_variables(self.optimizer) | shadows | scale

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Replace the network's weights with their averages within this context, if there are any (`training.ema`)."""
        if self.averages:
            self.averages.swap()
        try:
            yield
        finally:
            if self.averages:
                self.averages.swap()

    def run(self, batches: Any, num_steps: int, run_step: int, phase_step: int) -> tuple[np.ndarray, float, bool]:
        """Run `num_steps` steps, or fewer if a worker requests a stop.

        Args:
            batches: distributed iterator over this worker's batches.
            num_steps: number of steps to run.
            run_step: steps of the run before this call; dropout depends on it.
            phase_step: steps of the phase before this call; the decay of the averages depends on it.

        Returns:
            - For each executed step, three sums over all workers, float32 [n, 3]: the weighted losses, the correct
              examples, and all examples.
            - The seconds for which this worker waited for data.
            - Whether a worker requested a stop, equal on all workers.
        """
        if self.settings.xla and not self.traced:  # the names of functions are part of the key of a stored XLA program
            advance_function_numbers((self.settings.phase + 1) * FUNCTIONS_PER_PHASE)
        call_sums, waited, stopped, steps_done = list[np.ndarray](), 0.0, False, 0
        while steps_done < num_steps and not stopped:
            remaining_steps = num_steps - steps_done
            call_steps = num_steps if self.settings.polls_each_step else min(self._steps_per_call, remaining_steps)
            started_at = time.perf_counter()
            sums, wait_seconds, stop_flag = self._compiled_loop(
                batches, tf.constant(call_steps), tf.constant(run_step + steps_done, tf.int64),
                tf.constant(phase_step + steps_done, tf.int64),
            )  # fmt: skip
            call_sums.append(sums.numpy())
            waited, stopped, steps_done = waited + float(wait_seconds), bool(stop_flag), steps_done + len(call_sums[-1])
            seconds_per_step = (time.perf_counter() - started_at) / max(len(call_sums[-1]), 1)
            self._steps_per_call = max(int(CALL_SECONDS / seconds_per_step), 1)
            self.traced = True
        return np.concatenate(call_sums), waited, stopped

    def _loop(self, batches: Any, steps: tf.Tensor, run_step: tf.Tensor, phase_step: tf.Tensor) -> Any:
        """Run the steps in a graph. Returns the results of `run` as tensors: float32 [n, 3], float64 and bool."""
        on_replicas, local_results = self.strategy.run, self.strategy.experimental_local_results
        virtual_replicas = self.settings.virtual_replicas
        if virtual_replicas:
            terms_fn = self._terms_in_tree
        else:
            terms_fn = self._replica_terms if self.micro_batches == 1 else self._accumulated_terms
        polls, stop_requested = self.settings.polls_each_step, tf.constant(False)
        if not polls:
            stop_requested = self._is_stop_requested()
            with tf.device("CPU:0"):  # the loop's condition is computed on the host
                steps = tf.where(stop_requested, 1, steps)

        def is_unfinished(i: Any, stopped: Any, *_: Any) -> tf.Tensor:
            return tf.logical_and(i < steps, tf.logical_not(stopped)) if polls else i < steps

        def one_step(i: Any, stopped: Any, last_sums: Any, waited: Any, all_sums: Any) -> tuple[Any, ...]:
            batch, wait_seconds, stop_flag = self._fetch(batches, after=last_sums[0])
            step_index = tf.cast(i, tf.int64)
            examples, stop_flags = on_replicas(self._count_globally, args=(batch, stop_flag))
            terms = on_replicas(terms_fn, args=(batch, run_step + step_index, examples))
            gradients, (sums, *statistics) = terms[: len(self.variables)], terms[len(self.variables) :]
            self._update(gradients, examples)
            if statistics:
                by_layer = dict(zip(self.statistics_sizes, statistics, strict=True))
                self.network.update_moving_averages(self.strategy, by_layer)
            if self.averages:
                self._update_averages(phase_step + step_index)
            step_sums = local_results(sums)[0] if virtual_replicas else tf.add_n(local_results(sums))
            if polls:
                stopped = local_results(stop_flags)[0] > 0
            last_sums = (*last_sums[1:], step_sums)
            return i + 1, stopped, last_sums, waited + wait_seconds, all_sums.write(i, step_sums)

        # `tf.while_loop`, not a Python loop: the first use of AutoGraph in a process takes a third of a second.
        all_sums = tf.TensorArray(tf.float32, 0, dynamic_size=True, element_shape=[3])
        # Sums of the last one or two steps; a fetch waits for the first of them.
        last_sums = (tf.zeros([3]),) * (1 if polls else 2)
        initial_values = (tf.constant(0), stop_requested, last_sums, tf.zeros([], tf.float64), all_sums)
        _, stopped, _, waited, all_sums = tf.while_loop(is_unfinished, one_step, initial_values)
        sums = all_sums.stack()
        if self.is_multi_worker and not virtual_replicas:  # `sums` has the sums over the local replicas only
            sums = self.strategy.reduce(tf.distribute.ReduceOp.SUM, sums, axis=None)
        return sums, waited, stopped

    def _fetch(self, batches: Any, after: tf.Tensor) -> tuple[Batch, tf.Tensor, tf.Tensor]:
        """Fetch a batch once the tensor `after` is computed.

        With `polls_each_step`, `after` is from the last step. Otherwise it is from the step before the last one, so
        that the device computes the last step while the host fetches. The fetch then counts as waiting only if the
        batch is late.

        Returns:
            The batch, the seconds waited (a float64 scalar), and the stop flag, 1 or 0 (a float32 scalar).
        """
        # On a GPU, a control dependency does not wait until `after` is computed. A host call with that argument does.
        arguments = [] if self.settings.polls_each_step else [after]
        with tf.control_dependencies([after]):
            start = _call_on_host(time.perf_counter, arguments)  # tf.timestamp is not allowed with deterministic ops
        with tf.control_dependencies([start]):
            batch = next(batches)
        with tf.control_dependencies(tf.nest.flatten(batch, expand_composites=True)):
            waited = _call_on_host(time.perf_counter) - start
            stop_flag = _call_on_host(self.should_stop) if self.settings.polls_each_step else tf.zeros([], tf.float64)
            return batch, waited, tf.cast(stop_flag, tf.float32)

    def _is_stop_requested(self) -> tf.Tensor:
        """Return whether this process is requested to stop, a bool scalar on the host."""
        with tf.device("CPU:0"):
            return _call_on_host(self.should_stop) > 0

    def _count_globally(self, batch: Batch, stop_flag: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Sum the examples and the stop flags over all replicas, float32 scalars. Call in replica context."""
        counts = _all_reduce(tf.stack([tf.reduce_sum(batch["weight"]), stop_flag]), self.replicas)
        return tuple(tf.unstack(counts))

    def _terms(self, batch: Batch | dict[str, Any], run_step: tf.Tensor, examples: tf.Tensor) -> list[tf.Tensor]:
        """Compute the terms that a step sums over micro-batches and replicas. Call in replica context.

        Args:
            batch: a batch or micro-batch of this replica.
            run_step: steps of the run before this one, an int64 scalar.
            examples: number of examples in the global batch, a float32 scalar.

        Returns:
            - The gradients of this batch's part of the global mean loss, times the loss scale, in the order of the
              variables.
            - The sums of the weighted losses, of the correct examples and of all examples, float32 [3].
            - With virtual replicas, the statistics' sums of each normalization layer that uses batch statistics.
        """
        settings, tensors = self.settings, dict[str, Any](batch)
        teacher_logits = None
        if "teacher" in tensors:
            teacher_logits = safe_log(tensors["teacher"])
        elif self.teacher:
            teacher_logits = self.teacher(tensors["image"])
        tf_variables = [v.value for v in self.variables]
        collect = self.network.collect_statistics() if self.statistics_sizes else nullcontext({})
        # Accessed variables are not watched, so that the operations of frozen layers are not recorded.
        with collect as statistics, tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(tf_variables)
            logits = self.network.logits(
                batch["image"], training=True, batch_norm_training=settings.batch_norm_training, seed=settings.seed,
                step=run_step, position=batch["position"], weight=batch["weight"],
            )  # fmt: skip
            losses = compute_weighted_losses(tensors, logits, settings, teacher_logits)
            l2_penalty = self.network.l2_loss() / (self.replicas * self.micro_batches)
            loss = tf.reduce_sum(losses) / tf.maximum(examples, 1.0) + l2_penalty  # 0 if all images are skipped
            scaled_loss = loss * self.loss_scale[0] if self.loss_scale else loss
        gradients = tape.gradient(scaled_loss, tf_variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        num_correct = tf.reduce_sum(compute_example_accuracy(tensors, logits) * batch["weight"])
        sums = tf.stack([tf.reduce_sum(losses), num_correct, tf.reduce_sum(batch["weight"])])
        return [*gradients, sums, *(statistics[name] for name in self.statistics_sizes)]

    def _split_batch(self, batch: Batch) -> dict[str, Any]:
        """Reshape each tensor of a batch from [b, ...] to [micro-batches, b / micro-batches, ...]."""
        count = self.micro_batches
        return {k: tf.reshape(v, [count, v.shape[0] // count, *v.shape[1:]]) for k, v in dict[str, Any](batch).items()}

    def _accumulated_terms(self, batch: Batch, run_step: tf.Tensor, examples: tf.Tensor) -> list[tf.Tensor]:
        """Sum `_terms` over micro-batches, in sequence, so that only one micro-batch's activations are in memory."""
        micro_batches = self._split_batch(batch)

        def add(i: tf.Tensor, *sums: tf.Tensor) -> tuple[Any, ...]:
            terms = self._replica_terms({k: v[i] for k, v in micro_batches.items()}, run_step, examples)
            return i + 1, *(a + b for a, b in zip(sums, terms, strict=True))

        initial_values = tf.constant(0), *(tf.zeros(v.shape) for v in self.variables), tf.zeros([3])
        _, *sums = tf.while_loop(lambda i, *_: i < self.micro_batches, add, initial_values, parallel_iterations=1)
        return sums

    def _terms_in_tree(self, batch: Batch, run_step: tf.Tensor, examples: tf.Tensor) -> list[tf.Tensor]:
        """Sum `_terms` over the parts of all replicas, in a binary tree. Call in replica context.

        This replica's parts are computed in sequence, like micro-batches, and added as in a binary counter: `sums[l]`
        is the sum over 2**l parts, and waits for the sum over the next 2**l parts. The number of parts per replica is a
        power of two, so they form one subtree. The replicas' sums are then added in the same order, and every replica
        gets the total.
        """
        micro_batches, num_levels = self._split_batch(batch), self.micro_batches.bit_length()
        shapes = [tuple(v.shape) for v in self.variables] + [(3,), *((n,) for n in self.statistics_sizes.values())]
        sizes = [int(np.prod(shape)) for shape in shapes]

        def add(i: tf.Tensor, *sums: tf.Tensor) -> tuple[Any, ...]:
            terms = self._replica_terms({k: v[i] for k, v in micro_batches.items()}, run_step, examples)
            carry, is_carried, updated = tf.concat([tf.reshape(t, [-1]) for t in terms], 0), tf.constant(True), []
            for level, waiting in enumerate(sums):
                has_waiting = tf.bitwise.bitwise_and(i, 1 << level) > 0
                updated.append(tf.where(is_carried & ~has_waiting, carry, waiting))
                carry = tf.where(has_waiting, waiting + carry, carry)
                is_carried &= has_waiting
            return i + 1, *updated

        initial_values = tf.constant(0), *(tf.zeros([sum(sizes)]) for _ in range(num_levels))
        _, *sums = tf.while_loop(lambda i, *_: i < self.micro_batches, add, initial_values, parallel_iterations=1)
        parts = tf.split(self._add_replicas_in_tree(sums[-1]), sizes)
        return [tf.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)]

    def _add_replicas_in_tree(self, values: tf.Tensor) -> tf.Tensor:
        """Sum a vector over all replicas, a power of two, in a binary tree. Call in replica context.

        If each worker has one replica, and no GPU, each replica adds up one slice of all vectors, and gathers the other
        slices' sums: it receives 2 (R - 1) / R times the bytes of a vector, as in an all-reduce (Thakur et al. 2005).
        Otherwise each replica gathers all vectors, and receives R - 1 times the bytes of a vector: the devices of one
        process have a common memory, and on GPUs the exchange of slices is not tested.
        """
        replicas, size = self.replicas, values.shape[0]
        if replicas == 1:
            return values
        gather = tf.distribute.get_replica_context().all_gather
        if not self.exchanges_slices:
            return _add_in_tree(tf.ensure_shape(gather(values[None], axis=0), [replicas, size]))
        padded_values = tf.pad(values, [[0, -size % replicas]])
        slices = all_to_all(tf.reshape(padded_values, [replicas, -1]), replicas, key=self.settings.phase + 1)
        slice_sum = _add_in_tree(tf.ensure_shape(slices, [replicas, padded_values.shape[0] // replicas]))
        return tf.ensure_shape(gather(slice_sum, axis=0), padded_values.shape)[:size]

    def _update(self, gradients: Any, examples: Any) -> None:
        """Apply the optimizer. With loss scaling, adjust the scale, and skip the step if a gradient is not finite."""

        def apply() -> bool:
            self.strategy.run(lambda values: self.optimizer.apply(values, self.variables), args=(gradients,))
            return True

        if self.settings.clip_norm or self.loss_scale or self.settings.virtual_replicas:
            gradients, is_finite = self.strategy.run(self._unscale_and_clip, args=(gradients, examples))
        if self.loss_scale is None:
            apply()
        else:
            all_finite = self.strategy.experimental_local_results(is_finite)[0]
            tf.cond(all_finite, apply, lambda: False)
            self._adjust_loss_scale(all_finite)

    def _unscale_and_clip(self, gradients: list[tf.Tensor], examples: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Sum gradients over replicas, divide them by the loss scale, and clip by global norm. Call in replica context.

        Returns the gradients in a form that `optimizer.apply` sums over the replicas, and whether all gradients are
        finite, a bool scalar. Finiteness is tested only with loss scaling; otherwise the scalar is true.
        """
        # Sum before clipping, because the norm of the sum over replicas is what counts.
        is_total, is_finite = self.settings.virtual_replicas, tf.constant(True)
        gradients = gradients if is_total else _all_reduce(gradients, self.replicas)
        if self.loss_scale:
            gradients = [g / self.loss_scale[0] for g in gradients]
            is_finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in gradients])
        if self.settings.clip_norm:
            gradients, _ = tf.clip_by_global_norm(gradients, self.settings.clip_norm)
        # `optimizer.apply` sums over the replicas again.
        if is_total:  # a sum of equal fractions depends on its order, a sum with zeros does not
            # `examples` makes this variable on one replica: with a constant, TensorFlow would first multiply the
            # factors of clipping and learning rate.
            is_first = tf.equal(tf.distribute.get_replica_context().replica_id_in_sync_group, 0) & (examples >= 0)
            return [tf.where(is_first, g, tf.zeros_like(g)) for g in gradients], is_finite
        return [g / self.replicas for g in gradients], is_finite

    def _adjust_loss_scale(self, is_finite: tf.Tensor) -> None:
        """Halve the loss scale on overflow; double it after 2,000 finite steps in a row (Micikevicius et al. 2018)."""
        assert self.loss_scale is not None
        scale, finite_steps = self.loss_scale
        finite_count = tf.where(is_finite, finite_steps + 1.0, 0.0)
        is_doubled = finite_count >= LOSS_SCALE_GROWTH_STEPS
        scale.assign(tf.where(is_finite, tf.where(is_doubled, scale * 2.0, scale), tf.maximum(scale / 2.0, 1.0)))
        finite_steps.assign(tf.where(is_doubled, 0.0, finite_count))

    def _update_averages(self, phase_step: tf.Tensor) -> None:
        """Add (1 - decay) * (weight - average) to each average. At step t, the decay is at most (1 + t) / (10 + t)."""
        assert self.averages is not None
        t = tf.cast(phase_step, tf.float32)
        rate = 1.0 - tf.minimum(self.settings.ema, (1.0 + t) / (10.0 + t))
        for name, shadow in self.averages.shadows.items():
            weight = self.averages.weights[name]
            self.strategy.extended.update(shadow, lambda s, w: s.assign_add(rate * (w - s)), args=(weight.value,))
