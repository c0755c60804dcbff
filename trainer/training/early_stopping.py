"""Early stopping, and the choice of the best epoch, whose weights the next phase or the export starts from."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from trainer.config.phases import EarlyStopping
from trainer.training.state import RunState


def update_best(state: RunState, epoch: dict[str, Any], rule: EarlyStopping) -> bool:
    """Update `state.best` and `state.bad_epochs` after an epoch, and return whether it is the new best epoch.

    `epoch` is its entry of `state.history`. At equal accuracy, a lower validation loss makes an epoch the best one, so
    that a saturated accuracy does not select the earliest epoch. It still counts as an epoch without improvement.
    """
    value = epoch["val_accuracy"] if rule.metric == "accuracy" else -epoch["val_loss"]
    best = state.best
    improved, wins_tie = best is None, False
    if best is not None:
        improved = value > best["value"] + rule.min_delta
        wins_tie = rule.metric == "accuracy" and value == best["value"] and epoch["val_loss"] < best["val_loss"]
    if improved or wins_tie:
        state.best = {"step": state.step, "epoch": epoch["epoch"], "value": value, "val_loss": epoch["val_loss"]}
    state.bad_epochs = 0 if improved else state.bad_epochs + 1
    return improved or wins_tie


def is_out_of_patience(state: RunState, rule: EarlyStopping) -> bool:
    """Return whether the last `patience` epochs brought no improvement. A patience of 0 disables early stopping."""
    return bool(rule.patience) and state.bad_epochs >= rule.patience


def find_best_step(state: RunState, rule: EarlyStopping) -> int | None:
    """Return the step of the best epoch so far, over all phases. Return None before the first validation."""
    if state.best is None or state.carried is None:
        return state.best["step"] if state.best else state.carried
    entries = {entry["step"]: entry for entry in state.history}

    def rank(step: int) -> tuple[float, ...]:
        accuracy, loss = entries[step]["val_accuracy"], entries[step]["val_loss"]
        return (accuracy, -loss) if rule.metric == "accuracy" else (-loss,)

    return max(state.best["step"], state.carried, key=rank)  # `max` returns the first of equal ranks


def summarize_phase(
    state: RunState, name: str, step: int, whole: Mapping[str, float] = MappingProxyType({})
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Summarize the finished phase `name`, whose phase weights are those of `step`.

    `whole` has their scores on the whole validation split if epochs are scored on a fraction of it. They replace those
    of the epoch, of which `epoch_val_accuracy` and `epoch_val_n` remain.

    Returns:
        The summary, and the history entry of `step`. If `step` belongs to an earlier phase, `kept_from` in the summary
        is the name of that phase, and `own_val_accuracy` the accuracy of the best epoch of this phase.
    """
    assert state.best is not None
    epochs = [entry for entry in state.history if entry["phase"] == name]
    selected = next(entry for entry in state.history if entry["step"] == step)
    summary = {
        **{key: value for key, value in selected.items() if key.startswith("val_")},
        **whole,
        "epochs": len(epochs),
        "best_epoch": state.best["epoch"],
        "kept_step": step,
        "seconds": sum(entry["seconds"] for entry in epochs),
    }
    if whole:
        summary |= {f"epoch_{key}": selected[key] for key in ("val_accuracy", "val_n") if key in selected}
    if selected["phase"] != name:
        best = next(entry for entry in epochs if entry["step"] == state.best["step"])
        summary |= {"kept_from": selected["phase"], "own_val_accuracy": best["val_accuracy"]}
    return summary, selected


def describe_phase_end(
    name: str, summary: Mapping[str, Any], entry: Mapping[str, Any], weights: str, epoch: str
) -> list[str]:
    """Describe the end of a phase in lines of the log, from the results of `summarize_phase`.

    `weights` names the weights that the run continues from, as "the best weights", `epoch` their epoch, as "epoch 3".
    """
    accuracy = f"{entry['val_accuracy']:.4f}"
    line = f"phase {name}: val_accuracy {accuracy}; continuing from {weights} ({epoch})"
    if "kept_from" in summary:
        line = f"phase {name}: best val_accuracy {summary['own_val_accuracy']:.4f}, not better than {accuracy} "
        line += f"before it; continuing from the weights of {entry['phase']} ({epoch})"
    if "epoch_val_accuracy" not in summary:
        return [line]
    return [line, f"  on all {summary['val_n']:,} validation examples: val_accuracy {summary['val_accuracy']:.4f}"]
