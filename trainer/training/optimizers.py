"""Keras optimizers and learning-rate schedules from the configuration."""

from typing import Any

import keras
import tensorflow as tf
from keras.optimizers.schedules import LearningRateSchedule

from trainer.config.phases import Optimizer, Schedule
from trainer.private_api import variable_index

schedules = keras.optimizers.schedules


class WarmUp(LearningRateSchedule):
    """Linear warm-up over `steps` steps, peak * (s + 1) / (steps + 1) at step s, then the schedule `after`."""

    def __init__(self, peak: float, steps: int, after: LearningRateSchedule) -> None:
        super().__init__()
        self.peak, self.steps, self.after = peak, steps, after

    def __call__(self, step: Any) -> tf.Tensor:
        step = tf.cast(step, tf.float32)
        warmup = self.peak * (step + 1) / (self.steps + 1)
        return tf.where(step < self.steps, warmup, self.after(tf.maximum(step - self.steps, 0)))


def build_schedule(
    schedule: Schedule, rate: float, *, total_steps: int, steps_per_epoch: int, batch_size: int
) -> LearningRateSchedule:
    """Build the learning rate as a function of the step within the phase, 0 <= step < total_steps.

    constant; cosine: from `rate` to `final * rate` over the steps after the warm-up (Loshchilov & Hutter 2017);
    exponential: rate * decay ** (step / every), continuous; time: rate / (1 + decay * step); step: multiplied by
    `decay` at each of `at`.
    """

    def steps(duration: Any) -> int:
        return duration.steps(steps_per_epoch, batch_size)

    warmup = min(steps(schedule.warmup), total_steps)
    match schedule.name:
        case "cosine":
            body = schedules.CosineDecay(rate, max(total_steps - warmup, 1), alpha=schedule.final)
        case "exponential":
            body = schedules.ExponentialDecay(rate, steps(schedule.every), schedule.decay)
        case "time":
            body = schedules.InverseTimeDecay(rate, 1, schedule.decay)
        case "step":
            factors = [rate * (schedule.decay or 1.0) ** i for i in range(len(schedule.at) + 1)]
            # Keras uses the first value for step <= boundary; here step 10 of `at: 10 steps` has the new rate.
            body = schedules.PiecewiseConstantDecay([steps(at) - 1 for at in schedule.at], factors)
        case _:
            body = schedules.PiecewiseConstantDecay([0], [rate, rate])
    return WarmUp(rate, warmup, body) if warmup else body


def build_optimizer(
    optimizer: Optimizer, rate: LearningRateSchedule, lr_multipliers: tuple[float, ...] = ()
) -> keras.optimizers.Optimizer:
    """Build a Keras optimizer; options that are null have Keras' defaults.

    Args:
        lr_multipliers: factors of `rate`, one per variable; empty: `rate` for all, and Keras' own class.
    """
    names = {"adam": "Adam", "adamw": "AdamW", "adamax": "Adamax", "sgd": "SGD", "rmsprop": "RMSprop"}
    cls = getattr(keras.optimizers, names[optimizer.name])
    if lr_multipliers:
        cls = _with_lr_multipliers(cls, lr_multipliers)
    # A fixed name: Keras numbers the optimizers of a process, and checkpoints need stable names.
    return cls(learning_rate=rate, name="optimizer", **optimizer.options)


def _with_lr_multipliers(cls: Any, lr_multipliers: tuple[float, ...]) -> Any:
    """Subclass an optimizer class with a learning-rate multiplier per variable.

    The learning rate of `update_step` is scaled, not the gradient, which adaptive optimizers normalize. AdamW's weight
    decay scales with it, because Keras multiplies it by the rate.
    """

    class WithLrMultipliers(cls):
        weight_decay: Any

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            # Keras decays all variables at one rate before the first update; here each decays before its own update.
            self.decay, self.weight_decay = self.weight_decay, None

        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            multiplier = lr_multipliers[variable_index(self, variable)]
            rate = learning_rate if multiplier == 1 else learning_rate * multiplier
            if self.decay is not None:
                self.assign_sub(variable, variable * self.decay * rate)
            super().update_step(gradient, variable, rate)

    return WithLrMultipliers
