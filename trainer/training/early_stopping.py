"""Which epoch was best, and when to stop looking for a better one."""

from __future__ import annotations

from typing import Any

from trainer.config.phases import EarlyStopping
from trainer.training.state import RunState


def judge(state: RunState, epoch: dict[str, Any], rule: EarlyStopping) -> bool:
    """Take a finished epoch into the state's best-so-far; returns whether it is the new best.

    Ties in accuracy go to the lower validation loss, so that a saturated accuracy does not keep the earliest epoch.
    """
    key = "val_accuracy" if rule.metric == "accuracy" else "val_loss"
    value = epoch[key] if rule.metric == "accuracy" else -epoch[key]
    best = state.best
    better = best is None or value > best["value"] + rule.min_delta
    tie = (
        best is not None
        and rule.metric == "accuracy"
        and value == best["value"]
        and epoch["val_loss"] < best["val_loss"]
    )
    if better or tie:
        state.best = {"step": state.step, "epoch": epoch["epoch"], "value": value, "val_loss": epoch["val_loss"]}
    state.bad_epochs = 0 if better else state.bad_epochs + 1
    return better or tie


def best_step(state: RunState, rule: EarlyStopping) -> int | None:
    """The step of the best epoch so far, over all phases: a phase that only made it worse has none of its own."""
    own = state.best["step"] if state.best else None
    if own is None or state.carried is None:
        return state.carried if own is None else own
    scored = {entry["step"]: entry for entry in state.history}

    def rank(step: int) -> tuple[float, ...]:
        accuracy, loss = scored[step]["val_accuracy"], scored[step]["val_loss"]
        return (accuracy, -loss) if rule.metric == "accuracy" else (-loss,)

    return state.carried if rank(state.carried) > rank(own) else own


def exhausted(state: RunState, rule: EarlyStopping) -> bool:
    """Whether patience has run out."""
    return bool(rule.patience) and state.bad_epochs >= rule.patience
