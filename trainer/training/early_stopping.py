"""Best epoch of a phase: early stopping, and the phase weights that the next phase or the export starts from."""

from typing import Any

from trainer.config.phases import EarlyStopping
from trainer.training.state import RunState


def update_best(state: RunState, epoch: dict[str, Any], rule: EarlyStopping) -> bool:
    """Update `state.best` and `state.bad_epochs` with a finished epoch; return whether it is the new best.

    Ties in accuracy go to the lower validation loss, so that a saturated accuracy does not select the earliest epoch.
    """
    value = epoch["val_accuracy"] if rule.metric == "accuracy" else -epoch["val_loss"]
    best = state.best
    better, tie = best is None, False
    if best is not None:
        better = value > best["value"] + rule.min_delta
        tie = rule.metric == "accuracy" and value == best["value"] and epoch["val_loss"] < best["val_loss"]
    if better or tie:
        state.best = {"step": state.step, "epoch": epoch["epoch"], "value": value, "val_loss": epoch["val_loss"]}
    state.bad_epochs = 0 if better else state.bad_epochs + 1
    return better or tie


def out_of_patience(state: RunState, rule: EarlyStopping) -> bool:
    """Return whether `patience` epochs in a row did not improve; a patience of 0 disables early stopping."""
    return bool(rule.patience) and state.bad_epochs >= rule.patience


def best_step(state: RunState, rule: EarlyStopping) -> int | None:
    """Return the step of the best epoch so far; where the phase did not improve, that is one of an earlier phase."""
    own = state.best["step"] if state.best else None
    if own is None or state.carried is None:
        return state.carried if own is None else own
    entries = {entry["step"]: entry for entry in state.history}

    def rank(step: int) -> tuple[float, ...]:
        accuracy, loss = entries[step]["val_accuracy"], entries[step]["val_loss"]
        return (accuracy, -loss) if rule.metric == "accuracy" else (-loss,)

    return state.carried if rank(state.carried) > rank(own) else own


def select_phase_weights(state: RunState, rule: EarlyStopping, keep: str) -> int:
    """Return the step of the phase weights: of the best epoch (`best_step`), or the last for `training.keep=last`."""
    best = best_step(state, rule)
    return best if keep == "best" and best is not None else state.step


def summarise_phase(state: RunState, name: str, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the record of a finished phase with the weights of `step`, and the history entry of that step.

    Where they are the weights of an earlier phase, `kept_from` is its name and `own_val_accuracy` the best of this one.
    """
    assert state.best is not None
    epochs = [entry for entry in state.history if entry["phase"] == name]
    selected = next(entry for entry in state.history if entry["step"] == step)
    summary = {
        **{key: value for key, value in selected.items() if key.startswith("val_")},
        "epochs": len(epochs),
        "best_epoch": state.best["epoch"],
        "kept_step": step,
        "seconds": sum(entry["seconds"] for entry in epochs),
    }
    if selected["phase"] != name:
        best = next(entry for entry in epochs if entry["step"] == state.best["step"])
        summary |= {"kept_from": selected["phase"], "own_val_accuracy": best["val_accuracy"]}
    return summary, selected
