"""Compiled training step.

All replicas compute the gradient of one global mean: loss = sum(per_example * weight) / sum(weight over the global
batch), so the result does not depend on padding (weight 0) or on how examples are distributed over replicas. The sum of
weights is all-reduced before the gradient, together with the votes to stop: all workers stop after the same step.

`TrainingStep.run` calls the compiled loop (`_loop`), whose body is one step; `_gradients` has the gradient tape.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

from trainer.config.schema import RunConfig
from trainer.errors import Diverged
from trainer.training import variables as by_name
from trainer.training.losses import LossSettings, class_weights, example_accuracy, log_probs, weighted_losses
from trainer.types import Batch, Dataset

FIRST_LOSS_SCALE, LOSS_SCALE_GROWTH_STEPS = 2.0**15, 2000


class Network(Protocol):
    """Interface of a classifier in a training step (`trainer/models/classifier.py`)."""

    def logits(
        self, images: Any, *, training: bool = False, batch_norm_training: bool = False, seed: int = 0, step: Any = 0,
        position: Any = None, weight: Any = None,
    ) -> Any:  # fmt: skip
        """Float32 [b, classes] for images in 0..255, [b, S, S, 3]."""

    def l2_loss(self) -> tf.Tensor:
        """L2 penalty on the head, a scalar."""


class Teacher(Protocol):
    """Interface of a teacher in a training step (`trainer/distillation/teacher.py`)."""

    def logits(self, images: Any, *, training: bool = False) -> Any:
        """Float32 [b, classes], without gradient, for images in 0..255, [b, S, S, 3]."""


@dataclass(frozen=True, kw_only=True)
class StepSettings(LossSettings):
    """Settings of a training step."""

    seed: int
    clip_norm: float | None = None
    accumulate: int = 1  # micro-batches per step
    ema: float | None = None  # decay
    batch_norm_training: bool = False
    loss_scaling: bool = False  # float16
    xla: bool = False  # compile the forward and backward pass; collectives and the optimizer stay outside

    @classmethod
    def from_config(cls, config: RunConfig, dataset: Dataset, batch_norm_training: bool) -> StepSettings:
        """Make the settings of a phase from the configuration and the class counts of the training split."""
        training, runtime, distillation = config.training, config.runtime, config.distillation
        soft = {"alpha": distillation.alpha, "temperature": distillation.temperature} if distillation else {}
        return cls(
            seed=config.seed,
            label_smoothing=training.label_smoothing,
            focal_gamma=training.focal_gamma if training.loss == "focal" else None,
            class_weights=class_weights(training.class_weights, dataset.class_names, dataset.splits["train"].labels),
            clip_norm=training.clip_norm,
            accumulate=training.accumulate,
            ema=training.ema,
            batch_norm_training=batch_norm_training,
            loss_scaling=runtime.precision == "float16",
            xla=runtime.xla,
            **soft,
        )


def require_finite(sums: np.ndarray, step: int, phase: str, epoch: int) -> None:
    """Raise `Diverged` unless the sums of `TrainingStep.run`, float32 [steps, 3] up to `step`, are finite."""
    if not np.isfinite(sums).all():
        first = step - len(sums) + 1 + int(np.argmax(~np.isfinite(sums).all(-1)))
        raise Diverged(
            f"the loss is not finite at step {first} (phase {phase}, epoch {epoch})",
            fix=f"lower phases.{phase}.optimizer.learning_rate, or set training.clip_norm=1",
        )


@dataclass
class Averages:
    """Exponential moving averages of the trained weights."""

    shadows: dict[str, tf.Variable]
    weights: dict[str, keras.Variable]  # the averaged variables, by the same names

    def swap(self) -> None:
        """Swap averaged and raw weights; a second call restores them."""
        averaged, raw = by_name.read(self.shadows), by_name.read(self.weights)
        by_name.write(self.weights, averaged, "the averages")
        by_name.write(self.shadows, raw, "the weights")


def _host_value(function: Callable[[], float]) -> tf.Tensor:
    """Call a Python function during graph execution; float64 scalar."""
    value = tf.numpy_function(lambda: np.float64(function()), [], tf.float64)
    value.set_shape([])
    return value


def _all_reduce(values: Any, replicas: int) -> Any:
    if replicas == 1:
        return values
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, values)


class TrainingStep:
    """Several optimizer steps per device call, under any distribution strategy."""

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        network: Network,
        trained: dict[str, keras.Variable],
        optimizer: keras.optimizers.Optimizer,
        settings: StepSettings,
        *,
        stop: Callable[[], bool] = lambda: False,
        teacher: Teacher | None = None,
    ) -> None:
        """Build the optimizer, averages and loss scale in the scope of the strategy.

        Args:
            stop: called at each step in a TensorFlow thread; where it is true on any worker, all stop after that step.
            teacher: computes logits in each step; None: batches have its probabilities, or there is no distillation.
        """
        self.strategy, self.network, self.optimizer, self.teacher = strategy, network, optimizer, teacher
        self.variables, self.settings, self.stop = list(trained.values()), settings, stop
        self.replicas = strategy.num_replicas_in_sync
        with strategy.scope():
            optimizer.build(self.variables)
            self.loss_scale: list[tf.Variable] | None = None  # float32 [scale, finite steps in a row]
            if settings.loss_scaling:
                self.loss_scale = [tf.Variable(value, trainable=False) for value in (FIRST_LOSS_SCALE, 0.0)]
            self.averages: Averages | None = None
            if settings.ema:
                shadows = {n: tf.Variable(v, trainable=False) for n, v in by_name.read(trained).items()}
                self.averages = Averages(shadows, trained)
        self.traced = False  # the first call traces and compiles
        self._compiled_loop = tf.function(self._loop, autograph=False)
        self._replica_gradients: Callable[..., Any] = self._gradients
        if settings.xla:
            compiled = tf.function(self._gradients, jit_compile=True, autograph=False)
            # A lambda, because a strategy compiles a bare tf.function for all replicas at once.
            self._replica_gradients = lambda *arguments: compiled(*arguments)

    def checkpoint_variables(self) -> dict[str, Any]:
        """Return the optimizer's variables, averages and loss scale by name."""
        shadows = {f"ema/{name}": shadow for name, shadow in self.averages.shadows.items()} if self.averages else {}
        scale = {f"loss_scale/{i}": variable for i, variable in enumerate(self.loss_scale or [])}
        return by_name.optimizer_variables(self.optimizer) | shadows | scale

    def run(self, batches: Any, steps: int, run_step: int, phase_step: int) -> tuple[np.ndarray, float, bool]:
        """Run `steps` steps on the iterator `batches`, or fewer if `stop` returns true.

        Args:
            run_step: steps of the run so far; seeds dropout.
            phase_step: steps of the phase so far; the EMA decay depends on it.

        Returns:
            float32 [steps, 3], per step and over all workers: sum of losses, correct examples, examples; the seconds
            that this worker waited for data; whether the call was stopped, equal on all workers.
        """
        per_step, waited, stopped = self._compiled_loop(
            batches, tf.constant(steps), tf.constant(run_step, tf.int64), tf.constant(phase_step, tf.int64)
        )
        self.traced = True
        return per_step.numpy(), float(waited), bool(stopped)

    def _loop(self, batches: Any, steps: tf.Tensor, run_step: tf.Tensor, phase_step: tf.Tensor) -> Any:
        """Graph of `run`: float32 [steps, 3]; seconds, float64; bool."""
        in_replicas, local = self.strategy.run, self.strategy.experimental_local_results
        gradients_of = self._replica_gradients if self.settings.accumulate == 1 else self._accumulated_gradients

        def unfinished(i: Any, stopped: Any, *_: Any) -> tf.Tensor:
            return tf.logical_and(i < steps, tf.logical_not(stopped))

        def one_step(i: Any, _stopped: Any, last: Any, waited: Any, per_step: Any) -> tuple[Any, ...]:
            batch, seconds, stop_vote = self._fetch(batches, after=last)
            done = tf.cast(i, tf.int64)
            examples, stop_votes = in_replicas(self._global_counts, args=(batch, stop_vote))
            gradients, sums = in_replicas(gradients_of, args=(batch, run_step + done, examples))
            self._update(gradients)
            if self.averages:
                self._average(phase_step + done)
            row = tf.add_n(local(sums))
            return i + 1, local(stop_votes)[0] > 0, row, waited + seconds, per_step.write(i, row)

        # Not a Python `while`: the first use of autograph in a process takes a third of a second.
        per_step = tf.TensorArray(tf.float32, 0, dynamic_size=True, element_shape=[3])
        initial = (tf.constant(0), tf.constant(False), tf.zeros([3]), tf.zeros([], tf.float64), per_step)
        _, stopped, _, waited, per_step = tf.while_loop(unfinished, one_step, initial)
        sums = per_step.stack()
        if isinstance(self.strategy, tf.distribute.MultiWorkerMirroredStrategy):  # `sums` has the local replicas only
            sums = self.strategy.reduce(tf.distribute.ReduceOp.SUM, sums, axis=None)
        return sums, waited, stopped

    def _fetch(self, batches: Any, after: tf.Tensor) -> tuple[Batch, tf.Tensor, tf.Tensor]:
        """Fetch a batch after `after` is computed; also the seconds waited, float64, and the stop vote, 1.0 or 0.0."""
        with tf.control_dependencies([after]):
            start = _host_value(time.perf_counter)  # tf.timestamp is not allowed with deterministic ops
        with tf.control_dependencies([start]):
            batch = next(batches)
        with tf.control_dependencies(tf.nest.flatten(batch, expand_composites=True)):
            waited = _host_value(time.perf_counter) - start
            return batch, waited, tf.cast(_host_value(self.stop), tf.float32)

    def _global_counts(self, batch: Batch, stop_vote: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """In a replica: all-reduce the number of examples and the votes to stop; float32 scalars."""
        counts = _all_reduce(tf.stack([tf.reduce_sum(batch["weight"]), stop_vote]), self.replicas)
        return tuple(tf.unstack(counts))

    def _gradients(
        self, batch: Batch | dict[str, Any], run_step: tf.Tensor, examples: tf.Tensor
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        """In a replica: gradients of its part of the global mean loss, and float32 [3]: loss sum, correct, examples.

        Args:
            examples: examples of the global batch, float32 scalar.
        """
        settings, rows = self.settings, dict[str, Any](batch)
        teacher_logits = None
        if "teacher" in rows:
            teacher_logits = log_probs(rows["teacher"])
        elif self.teacher:
            teacher_logits = self.teacher.logits(rows["image"])
        raw = [v.value for v in self.variables]
        with tf.GradientTape(watch_accessed_variables=False) as tape:  # nothing is recorded for frozen layers
            tape.watch(raw)
            logits = self.network.logits(
                batch["image"], training=True, batch_norm_training=settings.batch_norm_training, seed=settings.seed,
                step=run_step, position=batch["position"], weight=batch["weight"],
            )  # fmt: skip
            losses = weighted_losses(rows, logits, settings, teacher_logits)
            penalty = self.network.l2_loss() / (self.replicas * settings.accumulate)
            loss = tf.reduce_sum(losses) / examples + penalty
            scaled = loss * self.loss_scale[0] if self.loss_scale else loss
        gradients = tape.gradient(scaled, raw, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        num_correct = tf.reduce_sum(example_accuracy(rows, logits) * batch["weight"])
        return gradients, tf.stack([tf.reduce_sum(losses), num_correct, tf.reduce_sum(batch["weight"])])

    def _accumulated_gradients(
        self, batch: Batch, run_step: tf.Tensor, examples: tf.Tensor
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        """`_gradients` of `accumulate` micro-batches in sequence, with the activations of one in memory."""
        count = self.settings.accumulate
        micro: dict[str, Any] = {
            k: tf.reshape(v, [count, v.shape[0] // count, *v.shape[1:]]) for k, v in dict[str, Any](batch).items()
        }

        def add(i: tf.Tensor, gradients: list[tf.Tensor], sums: tf.Tensor) -> tuple[Any, ...]:
            more, part = self._replica_gradients({k: v[i] for k, v in micro.items()}, run_step, examples)
            return i + 1, [a + b for a, b in zip(gradients, more, strict=True)], sums + part

        initial = tf.constant(0), [tf.zeros(v.shape) for v in self.variables], tf.zeros([3])
        _, gradients, sums = tf.while_loop(lambda i, *_: i < count, add, initial, parallel_iterations=1)
        return gradients, sums

    def _update(self, gradients: Any) -> None:
        """Apply the optimizer; with loss scaling only where all gradients are finite."""

        def apply() -> bool:
            self.strategy.run(lambda values: self.optimizer.apply(values, self.variables), args=(gradients,))
            return True

        if self.settings.clip_norm or self.loss_scale:
            gradients, finite = self.strategy.run(self._clipped, args=(gradients,))
        if self.loss_scale is None:
            apply()
        else:
            all_finite = self.strategy.experimental_local_results(finite)[0]
            tf.cond(all_finite, apply, lambda: False)
            self._adjust_loss_scale(all_finite)

    def _clipped(self, gradients: list[tf.Tensor]) -> tuple[list[tf.Tensor], tf.Tensor]:
        """In a replica: unscaled gradients, clipped by the norm of the global gradient; whether all are finite."""
        # Clipping needs the gradient of the global batch: all-reduce first, then undo the sum in `apply`.
        gradients, finite = _all_reduce(gradients, self.replicas), tf.constant(True)
        if self.loss_scale:
            gradients = [g / self.loss_scale[0] for g in gradients]
            finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in gradients])
        if self.settings.clip_norm:
            gradients, _ = tf.clip_by_global_norm(gradients, self.settings.clip_norm)
        return [g / self.replicas for g in gradients], finite

    def _adjust_loss_scale(self, finite: tf.Tensor) -> None:
        """Halve the loss scale on overflow, double it after 2,000 finite steps (Micikevicius et al. 2018)."""
        assert self.loss_scale is not None
        scale, good = self.loss_scale
        good_now = tf.where(finite, good + 1.0, 0.0)
        grown = good_now >= LOSS_SCALE_GROWTH_STEPS
        scale.assign(tf.where(finite, tf.where(grown, scale * 2.0, scale), tf.maximum(scale / 2.0, 1.0)))
        good.assign(tf.where(grown, 0.0, good_now))

    def _average(self, phase_step: tf.Tensor) -> None:
        """shadow += (1 - decay) * (weight - shadow), with decay at most (1 + t) / (10 + t) at step t."""
        assert self.averages is not None
        t = tf.cast(phase_step, tf.float32)
        rest = 1.0 - tf.minimum(self.settings.ema, (1.0 + t) / (10.0 + t))
        for name, shadow in self.averages.shadows.items():
            weight = self.averages.weights[name]
            self.strategy.extended.update(shadow, lambda s, w: s.assign_add(rest * (w - s)), args=(weight.value,))
