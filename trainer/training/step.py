"""The compiled training step.

All replicas compute the gradient of the same global mean: loss = sum(per_example * weight) / sum(weight over the
whole batch), so that padding (weight 0) and uneven replicas change nothing. The sum of weights is added up over all
replicas before the gradient; the votes to stop travel with it, so that all workers stop after the same step.

`TrainingStep.run` calls the compiled loop, whose body is one step; a step runs a few functions in each replica, one of
which, `_gradients`, holds the gradient tape.
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
from trainer.training.losses import LossSettings, class_weights, hits, log_probs, weighted_losses
from trainer.types import Batch, Dataset

FIRST_LOSS_SCALE, LOSS_SCALE_GROWTH_STEPS = 2.0**15, 2000


class Network(Protocol):
    """The part of a classifier that a step needs (`trainer/models/classifier.py`)."""

    def logits(
        self, images: Any, *, training: bool = False, batch_norm_training: bool = False, seed: int = 0, step: Any = 0,
        position: Any = None, weight: Any = None,
    ) -> Any:  # fmt: skip
        """Float32 [b, classes] for images in 0..255, [b, S, S, 3]."""

    def l2_loss(self) -> tf.Tensor:
        """Scalar penalty on the head."""


class Teacher(Protocol):
    """The part of a teacher that a step needs (`trainer/distillation/teacher.py`)."""

    def logits(self, images: Any, *, training: bool = False) -> Any:
        """Float32 [b, classes], no gradient, for images in 0..255, [b, S, S, 3]."""


@dataclass(frozen=True, kw_only=True)
class StepSettings(LossSettings):
    """Settings of a step beside the network and the optimizer."""

    seed: int
    clip_norm: float | None = None
    accumulate: int = 1
    ema: float | None = None
    batch_norm_training: bool = False
    loss_scaling: bool = False  # float16
    xla: bool = False  # compile the forward and backward pass; collectives and the optimizer stay outside

    @classmethod
    def from_config(cls, config: RunConfig, dataset: Dataset, batch_norm_training: bool) -> StepSettings:
        """Settings of a step over the training examples of a dataset."""
        training, runtime, distillation = config.training, config.runtime, config.distillation
        teaching = {"alpha": distillation.alpha, "temperature": distillation.temperature} if distillation else {}
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
            **teaching,
        )


def require_finite(rows: np.ndarray, step: int, where: str, phase: str) -> None:
    """Raise `Diverged` where the loss of one of the steps up to `step`, float32 [steps, 3] of them, is not finite."""
    if np.isfinite(rows).all():
        return
    first = step - len(rows) + 1 + int(np.argmax(~np.isfinite(rows).all(-1)))
    raise Diverged(
        f"the loss is not finite at step {first} ({where}, between the steps {step - len(rows) + 1} and {step}); lower "
        f"phases.{phase}.optimizer.learning_rate, or set training.clip_norm=1"
    )


@dataclass
class Averages:
    """Exponential moving averages of the trained weights."""

    shadows: dict[str, tf.Variable]
    weights: dict[str, keras.Variable]  # what they follow, by the same names

    def swap(self) -> None:
        """Exchange averaged and raw weights; a second call exchanges them back."""
        averaged, raw = by_name.read(self.shadows), by_name.read(self.weights)
        by_name.write(self.weights, averaged, "the averages")
        by_name.write(self.shadows, raw, "the weights")


def _ask_host(question: Callable[[], float]) -> tf.Tensor:
    """The value of `question` on the host when the graph gets here, float64."""
    answer = tf.numpy_function(lambda: np.float64(question()), [], tf.float64)
    answer.set_shape([])
    return answer


def _now() -> tf.Tensor:
    """Seconds, float64; tf.timestamp is refused where ops must be deterministic."""
    return _ask_host(time.perf_counter)


def _all_reduce(values: Any, replicas: int) -> Any:
    if replicas == 1:
        return values
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, values)


class TrainingStep:
    """Several optimizer steps in one device call, over any strategy."""

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
        """`stop` is asked at each step, from a thread of TensorFlow's: true on any worker, it ends the call there.

        `teacher` answers for the images of each step; None: batches hold its probabilities, or nothing is distilled.
        """
        self.strategy, self.network, self.optimizer, self.teacher = strategy, network, optimizer, teacher
        self.variables, self.settings, self.stop = list(trained.values()), settings, stop
        self.replicas = strategy.num_replicas_in_sync
        with strategy.scope():
            optimizer.build(self.variables)
            self.loss_scale: list[tf.Variable] | None = None  # float32 [scale, good steps in a row]
            if settings.loss_scaling:
                self.loss_scale = [tf.Variable(first, trainable=False) for first in (FIRST_LOSS_SCALE, 0.0)]
            self.averages: Averages | None = None
            if settings.ema:
                shadows = {n: tf.Variable(v, trainable=False) for n, v in by_name.read(trained).items()}
                self.averages = Averages(shadows, trained)
        self.traced = False  # the first call takes long
        self._compiled_loop = tf.function(self._loop, autograph=False)
        self._replica_gradients: Callable[..., Any] = self._gradients
        if settings.xla:
            compiled = tf.function(self._gradients, jit_compile=True, autograph=False)
            # Not the tf.function itself, which a strategy would compile for all replicas as one.
            self._replica_gradients = lambda *arguments: compiled(*arguments)

    def checkpointed(self) -> dict[str, Any]:
        """Variables that a checkpoint holds beside the network's own, by name."""
        shadows = {f"ema/{name}": shadow for name, shadow in self.averages.shadows.items()} if self.averages else {}
        scale = {f"loss_scale/{i}": variable for i, variable in enumerate(self.loss_scale or [])}
        return by_name.of_optimizer(self.optimizer) | shadows | scale

    def run(self, batches: Any, steps: int, run_step: int, phase_step: int) -> tuple[np.ndarray, float, bool]:
        """Take `steps` steps from the iterator `batches`, fewer when asked to stop.

        Args:
            run_step: the run's step before the first of them; seeds dropout.
            phase_step: the phase's step before the first of them; warms up the EMA.

        Returns:
            float32 [steps taken, 3]: sum of losses, correct examples, examples of each step, over all workers; the
            seconds that this worker waited for data; whether it was asked to stop, the same on every worker.
        """
        per_step, waited, stopped = self._compiled_loop(
            batches, tf.constant(steps), tf.constant(run_step, tf.int64), tf.constant(phase_step, tf.int64)
        )
        self.traced = True
        return per_step.numpy(), float(waited), bool(stopped)

    def _loop(self, batches: Any, steps: tf.Tensor, run_step: tf.Tensor, phase_step: tf.Tensor) -> Any:
        """`run` in a graph: float32 [steps taken, 3]; seconds, float64; bool."""
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

        # Not a `while`, which autograph would have to convert: its first use in a process takes a third of a second.
        per_step = tf.TensorArray(tf.float32, 0, dynamic_size=True, element_shape=[3])
        begin = (tf.constant(0), tf.constant(False), tf.zeros([3]), tf.zeros([], tf.float64), per_step)
        _, stopped, _, waited, per_step = tf.while_loop(unfinished, one_step, begin)
        sums = per_step.stack()
        if isinstance(self.strategy, tf.distribute.MultiWorkerMirroredStrategy):  # each has added up its own replicas
            sums = self.strategy.reduce(tf.distribute.ReduceOp.SUM, sums, axis=None)
        return sums, waited, stopped

    def _fetch(self, batches: Any, after: tf.Tensor) -> tuple[Batch, tf.Tensor, tf.Tensor]:
        """The next batch once `after` is computed; seconds waited for it, float64; 1.0 to stop after it, or 0.0."""
        with tf.control_dependencies([after]):
            asked = _now()
        with tf.control_dependencies([asked]):
            batch = next(batches)
        with tf.control_dependencies(tf.nest.flatten(batch, expand_composites=True)):
            return batch, _now() - asked, tf.cast(_ask_host(self.stop), tf.float32)

    def _global_counts(self, batch: Batch, stop_vote: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """In a replica: the examples of the global batch, and how many replicas vote to stop; float32 scalars."""
        both = _all_reduce(tf.stack([tf.reduce_sum(batch["weight"]), stop_vote]), self.replicas)
        return tuple(tf.unstack(both))

    def _gradients(
        self, batch: Batch | dict[str, Any], run_step: tf.Tensor, examples: tf.Tensor
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        """In a replica: the gradients of what its rows add to the global mean loss, and float32 [3]: the sum of its
        losses, its correct examples, its examples.

        Args:
            examples: float32 scalar, of the global batch.
        """
        settings, rows = self.settings, dict[str, Any](batch)
        teacher_logits = None
        if "teacher" in rows:
            teacher_logits = log_probs(rows["teacher"])
        elif self.teacher:
            teacher_logits = self.teacher.logits(rows["image"])
        raw = [v.value for v in self.variables]
        with tf.GradientTape(watch_accessed_variables=False) as tape:  # what is frozen leaves nothing on the tape
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
        num_correct = tf.reduce_sum(hits(rows, logits) * batch["weight"])
        return gradients, tf.stack([tf.reduce_sum(losses), num_correct, tf.reduce_sum(batch["weight"])])

    def _accumulated_gradients(
        self, batch: Batch, run_step: tf.Tensor, examples: tf.Tensor
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        """`_gradients` in `accumulate` pieces, one after the other: only one piece's activations are held."""
        count = self.settings.accumulate
        pieces: dict[str, Any] = {
            k: tf.reshape(v, [count, v.shape[0] // count, *v.shape[1:]]) for k, v in dict[str, Any](batch).items()
        }

        def add(i: tf.Tensor, gradients: list[tf.Tensor], sums: tf.Tensor) -> tuple[Any, ...]:
            more, parts = self._replica_gradients({k: v[i] for k, v in pieces.items()}, run_step, examples)
            return i + 1, [a + b for a, b in zip(gradients, more, strict=True)], sums + parts

        nothing = tf.constant(0), [tf.zeros(v.shape) for v in self.variables], tf.zeros([3])
        _, gradients, sums = tf.while_loop(lambda i, *_: i < count, add, nothing, parallel_iterations=1)
        return gradients, sums

    def _update(self, gradients: Any) -> None:
        """One step of the optimizer; with loss scaling only where all gradients are finite."""

        def apply() -> bool:
            self.strategy.run(lambda given: self.optimizer.apply(given, self.variables), args=(gradients,))
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
        """In a replica: gradients without the loss scale, clipped by the norm of the whole; whether all are finite."""
        # Clipping needs the gradient of the whole batch: reduce first, then undo the sum that `apply` makes.
        gradients, finite = _all_reduce(gradients, self.replicas), tf.constant(True)
        if self.loss_scale:
            gradients = [g / self.loss_scale[0] for g in gradients]
            finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in gradients])
        if self.settings.clip_norm:
            gradients, _ = tf.clip_by_global_norm(gradients, self.settings.clip_norm)
        return [g / self.replicas for g in gradients], finite

    def _adjust_loss_scale(self, finite: tf.Tensor) -> None:
        """Halve on overflow, double after 2,000 good steps (Micikevicius et al. 2018)."""
        assert self.loss_scale is not None
        scale, good = self.loss_scale
        good_now = tf.where(finite, good + 1.0, 0.0)
        grown = good_now >= LOSS_SCALE_GROWTH_STEPS
        scale.assign(tf.where(finite, tf.where(grown, scale * 2.0, scale), tf.maximum(scale / 2.0, 1.0)))
        good.assign(tf.where(grown, 0.0, good_now))

    def _average(self, phase_step: tf.Tensor) -> None:
        """shadow += (1 - decay) * (weight - shadow), decay rising as (1 + t) / (10 + t) at first."""
        assert self.averages is not None
        t = tf.cast(phase_step, tf.float32)
        rest = 1.0 - tf.minimum(self.settings.ema, (1.0 + t) / (10.0 + t))
        for name, shadow in self.averages.shadows.items():
            weight = self.averages.weights[name]
            self.strategy.extended.update(shadow, lambda s, w: s.assign_add(rest * (w - s)), args=(weight.value,))
