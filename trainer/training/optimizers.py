"""Keras optimizers and learning-rate schedules by name."""

from typing import Any

import keras
import tensorflow as tf
from keras.optimizers.schedules import LearningRateSchedule

from trainer.config.phases import Optimizer, Schedule
from trainer.private_api import variable_index

schedules = keras.optimizers.schedules


class WarmUp(LearningRateSchedule):
    """Linear warm-up over `steps` steps, then the schedule `after` from its own step 0.

    Step s < steps has the rate peak * (s + 1) / (steps + 1): the first step already learns.
    """

    def __init__(self, peak: float, steps: int, after: LearningRateSchedule) -> None:
        super().__init__()
        self.peak, self.steps, self.after = peak, steps, after

    def __call__(self, step: Any) -> tf.Tensor:
        step = tf.cast(step, tf.float32)
        climb = self.peak * (step + 1) / (self.steps + 1)
        return tf.where(step < self.steps, climb, self.after(tf.maximum(step - self.steps, 0)))

    def get_config(self) -> dict[str, Any]:
        return {"peak": self.peak, "steps": self.steps, "after": schedules.serialize(self.after)}


def build_schedule(
    schedule: Schedule, rate: float, *, total_steps: int, steps_per_epoch: int, batch_size: int
) -> LearningRateSchedule:
    """The learning rate as a function of the phase's step, 0 <= step < total_steps.

    constant; cosine: Loshchilov & Hutter 2017, from `rate` to `final * rate` over what follows the warm-up;
    exponential: rate * decay ** (step / every), continuous; time: rate / (1 + decay * step); step: times `decay` at
    each of `at`.
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
            # Keras takes the first value for step <= boundary; "at step 10" means that step 10 has the new rate.
            body = schedules.PiecewiseConstantDecay([steps(at) - 1 for at in schedule.at], factors)
        case _:
            body = schedules.PiecewiseConstantDecay([0], [rate, rate])
    return WarmUp(rate, warmup, body) if warmup else body


def build_optimizer(
    optimizer: Optimizer, rate: LearningRateSchedule, lr_multipliers: tuple[float, ...] = ()
) -> keras.optimizers.Optimizer:
    """A fresh Keras optimizer; options left null keep Keras' defaults.

    Args:
        lr_multipliers: factors of `rate`, one for each variable that the optimizer will be built with; empty: `rate`
            for all, and Keras' own class.
    """
    kinds = {"adam": "Adam", "adamw": "AdamW", "adamax": "Adamax", "sgd": "SGD", "rmsprop": "RMSprop"}
    kind = getattr(keras.optimizers, kinds[optimizer.name])
    if lr_multipliers:
        kind = _with_lr_multipliers(kind, lr_multipliers)
    # A fixed name: Keras would number a second optimizer of the process, and a resumed run has but one.
    return kind(learning_rate=rate, name="optimizer", **optimizer.options)


def _with_lr_multipliers(kind: Any, lr_multipliers: tuple[float, ...]) -> Any:
    """The optimizer class `kind` with a learning rate of its own for each variable.

    Not the gradient is scaled, which Adam and its like would divide out again, but the rate that `update_step` is
    given, and with it AdamW's weight decay, which Keras multiplies by the rate.
    """

    class WithLrMultipliers(kind):
        weight_decay: Any

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            # Keras lets all variables decay at one rate before the first update: here each does before its own.
            self.decay, self.weight_decay = self.weight_decay, None

        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            multiplier = lr_multipliers[variable_index(self, variable)]
            own = learning_rate if multiplier == 1 else learning_rate * multiplier
            if self.decay is not None:
                self.assign_sub(variable, variable * self.decay * own)
            super().update_step(gradient, variable, own)

    return WithLrMultipliers
