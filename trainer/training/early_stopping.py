"""Early stopping, and the selection of the best epoch, whose weights the next phase and the export continue from."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from trainer.config.phases import EarlyStopping
from trainer.training.state import RunState


def update_best(state: RunState, epoch: dict[str, Any], rule: EarlyStopping) -> bool:
    """Update `state.best` and `state.bad_epochs` after an epoch, and return whether it is the new best epoch.

    `epoch` is the entry of the epoch for `state.history`. The epoch improves if its metric exceeds the best one by more
    than `rule.min_delta`. At equal accuracy, an epoch with a lower validation loss becomes the best one, but counts as
    an epoch without improvement. So a saturated accuracy does not select the earliest epoch.
    """
    score = epoch["val_accuracy"] if rule.metric == "accuracy" else -epoch["val_loss"]
    best = state.best
    is_improvement, wins_tie = best is None, False
    if best is not None:
        is_improvement = score > best["value"] + rule.min_delta
        wins_tie = rule.metric == "accuracy" and score == best["value"] and epoch["val_loss"] < best["val_loss"]
    if is_improvement or wins_tie:
        state.best = {"step": state.step, "epoch": epoch["epoch"], "value": score, "val_loss": epoch["val_loss"]}
    state.bad_epochs = 0 if is_improvement else state.bad_epochs + 1
    return is_improvement or wins_tie


def is_out_of_patience(state: RunState, rule: EarlyStopping) -> bool:
    """Return whether the last `patience` epochs of the phase are without improvement; never if `patience` is 0."""
    return bool(rule.patience) and state.bad_epochs >= rule.patience


def find_best_step(state: RunState, rule: EarlyStopping) -> int | None:
    """Return the step of the best epoch so far, over all phases; of equal epochs, that of the current phase.

    Earlier phases are included only if `training.keep` is best, because otherwise `state.carried` is None. Returns None
    if no epoch is included, that is, before the first validation.
    """
    if state.best is None or state.carried is None:
        return state.best["step"] if state.best else state.carried
    entries = {entry["step"]: entry for entry in state.history}

    def rank(step: int) -> tuple[float, ...]:
        val_accuracy, val_loss = entries[step]["val_accuracy"], entries[step]["val_loss"]
        return (val_accuracy, -val_loss) if rule.metric == "accuracy" else (-val_loss,)

    return max(state.best["step"], state.carried, key=rank)  # `max` returns the first of equal ranks


def summarize_phase(
    state: RunState, name: str, step: int, whole: Mapping[str, float] = MappingProxyType({})
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Summarize the finished phase `name`, whose phase weights are those of `step`.

    Args:
        state: the run state at the end of the phase, before it is advanced to the next phase.
        name: name of the phase.
        step: step whose weights the phase ends with; it can belong to an earlier phase.
        whole: scores of these weights on the whole validation split, if epochs are scored on a fraction of it. They
            replace the scores of the epoch, of which `epoch_val_accuracy` and `epoch_val_n` remain.

    Returns:
        The summary, for the report and `state.finished`, and the history entry of `step`. If `step` belongs to an
        earlier phase, `kept_from` in the summary is the name of that phase, and `own_val_accuracy` is the accuracy of
        the best epoch of this phase.
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
    """Describe the end of a phase in one or two lines for the log.

    Args:
        name: name of the phase.
        summary, entry: the results of `summarize_phase`.
        weights: name of the weights that the run continues from, such as "the best weights".
        epoch: name of the epoch of these weights, such as "epoch 3".
    """
    accuracy = f"{entry['val_accuracy']:.4f}"
    line = f"phase {name}: val_accuracy {accuracy}; continuing from {weights} ({epoch})"
    if "kept_from" in summary:
        line = f"phase {name}: best val_accuracy {summary['own_val_accuracy']:.4f}, not better than {accuracy} "
        line += f"before it; continuing from the weights of {entry['phase']} ({epoch})"
    if "epoch_val_accuracy" not in summary:
        return [line]
    return [line, f"  on all {summary['val_n']:,} validation examples: val_accuracy {summary['val_accuracy']:.4f}"]
