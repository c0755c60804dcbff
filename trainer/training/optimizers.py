"""Keras optimizers and learning-rate schedules, built from the configuration."""

from typing import Any

import keras
import tensorflow as tf
from keras.optimizers.schedules import LearningRateSchedule

from trainer.config.phases import Optimizer, Schedule
from trainer.private_api import get_variable_index

schedules = keras.optimizers.schedules

# Values of `optimizer.name` -> classes of Keras.
CLASSES = {
    "adam": "Adam", "adamw": "AdamW", "adamax": "Adamax", "sgd": "SGD", "rmsprop": "RMSprop", "adagrad": "Adagrad",
    "adadelta": "Adadelta", "nadam": "Nadam", "lion": "Lion",
}  # fmt: skip


class WarmUp(LearningRateSchedule):
    """Linear warm-up for `steps` steps, peak * (s + 1) / (steps + 1) at step s, then `main_schedule`."""

    def __init__(self, peak: float, steps: int, main_schedule: LearningRateSchedule) -> None:
        super().__init__()
        self.peak, self.steps, self.main_schedule = peak, steps, main_schedule

    def __call__(self, step: Any) -> tf.Tensor:
        step = tf.cast(step, tf.float32)
        warmup = self.peak * (step + 1) / (self.steps + 1)
        return tf.where(step < self.steps, warmup, self.main_schedule(tf.maximum(step - self.steps, 0)))


def build_schedule(
    schedule: Schedule, rate: float, *, total_steps: int, steps_per_epoch: int, batch_size: int
) -> LearningRateSchedule:
    """Build the learning rate as a function of the step within the phase, 0 <= step < total_steps.

    The schedules, where s is the number of steps since the end of the warm-up:
    - constant: always `rate`;
    - cosine: from `rate` at s = 0 to final * rate at the end of the phase (Loshchilov & Hutter 2017);
    - exponential: rate * decay ** (s / every);
    - time: rate / (1 + decay * s);
    - step: `rate`, multiplied by `decay` when s reaches each value of `at`.
    """

    def steps(duration: Any) -> int:
        return duration.steps(steps_per_epoch, batch_size)

    warmup = min(steps(schedule.warmup), total_steps)
    match schedule.name:
        case "cosine":
            main = schedules.CosineDecay(rate, max(total_steps - warmup, 1), alpha=schedule.final)
        case "exponential":
            main = schedules.ExponentialDecay(rate, steps(schedule.every), schedule.decay)
        case "time":
            main = schedules.InverseTimeDecay(rate, 1, schedule.decay)
        case "step":
            rates = [rate * (schedule.decay or 1.0) ** i for i in range(len(schedule.at) + 1)]
            # Keras changes the value after the boundary; subtracting 1 changes it at the boundary.
            main = schedules.PiecewiseConstantDecay([steps(at) - 1 for at in schedule.at], rates)
        case _:
            main = schedules.PiecewiseConstantDecay([0], [rate, rate])
    return WarmUp(rate, warmup, main) if warmup else main


def build_optimizer(
    optimizer: Optimizer, rate: LearningRateSchedule, lr_multipliers: tuple[float, ...] = ()
) -> keras.optimizers.Optimizer:
    """Build a Keras optimizer. `lr_multipliers` has one factor of `rate` per variable, or is empty if all are 1."""
    cls = getattr(keras.optimizers, CLASSES[optimizer.name])
    if lr_multipliers:
        cls = _with_lr_multipliers(cls, lr_multipliers)
    # A fixed name: checkpoints need stable names, and Keras would append a counter.
    return cls(learning_rate=rate, name="optimizer", **optimizer.options)


def _with_lr_multipliers(cls: Any, lr_multipliers: tuple[float, ...]) -> Any:
    """Derive an optimizer class that scales the learning rate, and with it the weight decay, per variable.

    Scaling gradients would have no effect in adaptive optimizers, which normalize them.
    """

    class WithLrMultipliers(cls):
        weight_decay: Any

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            # Keras decays all variables at one rate before the first update. Here each decays before its own update.
            self.decay, self.weight_decay = self.weight_decay, None

        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            multiplier = lr_multipliers[get_variable_index(self, variable)]
            rate = learning_rate if multiplier == 1 else learning_rate * multiplier
            if self.decay is not None:
                self.assign_sub(variable, variable * self.decay * rate)
            super().update_step(gradient, variable, rate)

    return WithLrMultipliers
