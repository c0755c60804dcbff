"""Keras optimizers and learning-rate schedules, built from the configuration."""

from typing import Any

import keras
import tensorflow as tf
from keras.optimizers.schedules import LearningRateSchedule

from trainer.config.phases import Optimizer, Schedule
from trainer.private_api import get_variable_index

schedules = keras.optimizers.schedules

CLASSES = {  # value of `optimizer.name` -> class in `keras.optimizers`
    "adam": "Adam", "adamw": "AdamW", "adamax": "Adamax", "sgd": "SGD", "rmsprop": "RMSprop", "adagrad": "Adagrad",
    "adadelta": "Adadelta", "nadam": "Nadam", "lion": "Lion",
}  # fmt: skip


class WarmUp(LearningRateSchedule):
    """A linear warm-up, followed by another schedule.

    At step s = 0, ..., steps - 1, the learning rate is peak * (s + 1) / (steps + 1). From then on, `main_schedule`
    determines it, with step 0 as the first step after the warm-up.
    """

    def __init__(self, peak: float, steps: int, main_schedule: LearningRateSchedule) -> None:
        super().__init__()
        self.peak, self.steps, self.main_schedule = peak, steps, main_schedule

    def __call__(self, step: Any) -> tf.Tensor:
        """Return the learning rate at a step of the phase, a float32 scalar."""
        step = tf.cast(step, tf.float32)
        warmup = self.peak * (step + 1) / (self.steps + 1)
        return tf.where(step < self.steps, warmup, self.main_schedule(tf.maximum(step - self.steps, 0)))


def build_schedule(
    schedule: Schedule, rate: float, *, total_steps: int, steps_per_epoch: int, batch_size: int
) -> LearningRateSchedule:
    """Build the learning rate as a function of the step within a phase, from 0 to `total_steps` - 1.

    `schedule.name` selects the function, in which s is the number of steps since the end of the warm-up:
    - constant: `rate`;
    - cosine: from `rate` at s = 0 to final * rate at the end of the phase (Loshchilov & Hutter 2017);
    - exponential: rate * decay ** (s / every);
    - time: rate / (1 + decay * s);
    - step: `rate`, multiplied by `decay` each time s reaches one of the values in `at`.

    Args:
        schedule: the function, its constants and the length of the warm-up.
        rate: learning rate at the end of the warm-up.
        total_steps: length of the phase in steps.
        steps_per_epoch, batch_size: used to convert lengths in epochs or examples to steps.
    """

    def steps(duration: Any) -> int:
        return duration.steps(steps_per_epoch, batch_size)

    warmup_steps = min(steps(schedule.warmup), total_steps)
    match schedule.name:
        case "cosine":
            main_schedule = schedules.CosineDecay(rate, max(total_steps - warmup_steps, 1), alpha=schedule.final)
        case "exponential":
            main_schedule = schedules.ExponentialDecay(rate, steps(schedule.every), schedule.decay)
        case "time":
            main_schedule = schedules.InverseTimeDecay(rate, 1, schedule.decay)
        case "step":
            # The configuration requires `decay` here; `or 1.0` is for the type checker.
            rates = [rate * (schedule.decay or 1.0) ** i for i in range(len(schedule.at) + 1)]
            # Keras changes the rate one step after a boundary, so the boundaries are one step earlier. It adds rates up
            # if they are not sorted, as positions in several units can be.
            boundaries = sorted(steps(position) - 1 for position in schedule.at)
            main_schedule = schedules.PiecewiseConstantDecay(boundaries, rates)
        case _:  # constant
            main_schedule = schedules.PiecewiseConstantDecay([0], [rate, rate])
    return WarmUp(rate, warmup_steps, main_schedule) if warmup_steps else main_schedule


def build_optimizer(
    optimizer: Optimizer, rate: LearningRateSchedule, lr_multipliers: tuple[float, ...] = ()
) -> keras.optimizers.Optimizer:
    """Build a Keras optimizer.

    Args:
        optimizer: class and options of the optimizer.
        rate: learning rate as a function of the step.
        lr_multipliers: one factor of `rate` per variable, in the order of the variables passed to the optimizer's
            `build`; empty if all are 1.
    """
    optimizer_class = getattr(keras.optimizers, CLASSES[optimizer.name])
    if lr_multipliers:
        optimizer_class = _with_lr_multipliers(optimizer_class, lr_multipliers)
    # The names of the optimizer's variables in checkpoints contain this name. The Keras default, such as "adam_1",
    # depends on the class and on how many of its optimizers this process has already built.
    return optimizer_class(learning_rate=rate, name="optimizer", **optimizer.options)


def _with_lr_multipliers(base_class: Any, lr_multipliers: tuple[float, ...]) -> Any:
    """Derive an optimizer class that multiplies the learning rate, and thus the weight decay, per variable.

    Scaling the gradients instead would have almost no effect in adaptive optimizers, which normalize gradients. The
    class ignores `exclude_from_weight_decay`.
    """

    class WithLearningRateMultipliers(base_class):
        weight_decay: Any  # set by the Keras constructor

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            # In each step, Keras decays all variables with the same learning rate, before it updates the first one.
            # Here, each variable decays with its own learning rate, before its update.
            self.decay, self.weight_decay = self.weight_decay, None

        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            multiplier = lr_multipliers[get_variable_index(self, variable)]
            rate = learning_rate if multiplier == 1 else learning_rate * multiplier
            if self.decay is not None:
                self.assign_sub(variable, variable * self.decay * rate)
            super().update_step(gradient, variable, rate)

    return WithLearningRateMultipliers
