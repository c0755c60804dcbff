"""Early stopping: whether an epoch is the best of its phase, and when the phase has had enough."""

from typing import Any

from trainer.config.phases import EarlyStopping
from trainer.training.state import RunState


def judge(state: RunState, epoch: dict[str, Any], rule: EarlyStopping) -> bool:
    """Update the best epoch of `state` with a finished one; returns whether that is the new best.

    Ties in accuracy go to the lower validation loss, so that a saturated accuracy does not keep the earliest epoch.
    """
    key = "val_accuracy" if rule.metric == "accuracy" else "val_loss"
    value = epoch[key] if rule.metric == "accuracy" else -epoch[key]
    best = state.best
    better, tie = best is None, False
    if best is not None:
        better = value > best["value"] + rule.min_delta
        tie = rule.metric == "accuracy" and value == best["value"] and epoch["val_loss"] < best["val_loss"]
    if better or tie:
        state.best = {"step": state.step, "epoch": epoch["epoch"], "value": value, "val_loss": epoch["val_loss"]}
    state.bad_epochs = 0 if better else state.bad_epochs + 1
    return better or tie


def exhausted(state: RunState, rule: EarlyStopping) -> bool:
    """Whether `patience` epochs in a row were no better than the best one; a patience of 0 never is."""
    return bool(rule.patience) and state.bad_epochs >= rule.patience
