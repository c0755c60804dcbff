"""Warnings: what would run, but hardly as it was meant."""

from __future__ import annotations

from trainer.planning.estimates import PhasePlan
from trainer.planning.sections import Plan


def look_for_trouble(plan: Plan, phases: list[PhasePlan]) -> None:
    """What would run, but hardly as it was meant."""
    config, warn, found = plan.config, plan.warnings.append, plan.dataset
    frozen = [name for name, phase in config.phases.items() if phase.batch_norm == "frozen" and not config.auto]
    if config.model.weights == "none" and not config.warm_start and frozen:
        warn(f"model.weights=none with batch_norm=frozen in {', '.join(frozen)}: normalisation stays as drawn, and the "
             f"score near chance; set phases.{frozen[0]}.batch_norm=train and phases.{frozen[0]}.thaw=all")  # fmt: skip
    limits = [f"debug.{key}={value}" for key, value in config.debug if value]
    if limits:
        warn(f"{', '.join(limits)}: this is a trial, not the real run")
    if not phases or found is None:
        return
    epoch = max(phases[0].steps / phases[0].epochs, 1)
    every = config.runtime.checkpoint_every.steps(round(epoch), config.training.batch_size)
    short = [phase.name for phase in phases if every > phase.steps]
    if short:
        warn(
            f"runtime.checkpoint_every={every:,} steps is longer than {', '.join(short)}: a stop costs up to all of it"
        )
    count = found.splits["train"].count
    if config.training.batch_size > count:
        warn(f"training.batch_size={config.training.batch_size} is more than the {count:,} training examples: "
             "each batch is the whole split and padding")  # fmt: skip
    if "test" not in found.splits and not config.debug.overfit:
        warn("there is no test split: the score is of the split that chose the checkpoint; set data.test_fraction")
    validation = found.splits["validation"].count if "validation" in found.splits else 0
    told = any("validation has only" in note for note in found.notes)
    if 0 < validation < 100 and not told:
        warn(f"validation has only {validation:,} examples: each is {100 / validation:.1f} points of accuracy")
