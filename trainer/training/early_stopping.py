"""Early stopping, and the selection of the best epoch, whose weights the next phase and the export continue from."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from trainer.config.phases import EarlyStopping
from trainer.training.state import RunState


def update_best(state: RunState, epoch_entry: dict[str, Any], rule: EarlyStopping) -> bool:
    """Update `state.best` and `state.bad_epochs` after an epoch, and return whether it is the new best epoch.

    The epoch is an improvement if its score (accuracy or negative loss) exceeds the best score by more than
    `rule.min_delta`. At equal accuracy, an epoch with a lower loss becomes the best epoch, but counts as one without
    improvement, so that a saturated accuracy does not select the earliest epoch.

    Args:
        state: the run state, which is changed.
        epoch_entry: the epoch's entry in `state.history`, with its validation scores.
        rule: the phase's early stopping: the metric, and the improvement that counts.
    """
    score = epoch_entry["val_accuracy"] if rule.metric == "accuracy" else -epoch_entry["val_loss"]
    best = state.best
    is_improvement, wins_tie = best is None, False
    if best is not None:
        is_improvement = score > best["value"] + rule.min_delta
        wins_tie = rule.metric == "accuracy" and score == best["value"] and epoch_entry["val_loss"] < best["val_loss"]
    if is_improvement or wins_tie:
        state.best = {
            "step": state.step, "epoch": epoch_entry["epoch"], "value": score, "val_loss": epoch_entry["val_loss"],
        }  # fmt: skip
    state.bad_epochs = 0 if is_improvement else state.bad_epochs + 1
    return is_improvement or wins_tie


def is_out_of_patience(state: RunState, rule: EarlyStopping) -> bool:
    """Return whether the phase's last `patience` epochs brought no improvement; always False if `patience` is 0."""
    return bool(rule.patience) and state.bad_epochs >= rule.patience


def find_best_step(state: RunState, rule: EarlyStopping) -> int | None:
    """Return the step of the best epoch of all phases so far. The current phase wins ties.

    Earlier phases are considered only if `training.keep` is best, because otherwise `state.carried` is None. Returns
    None if there is no epoch to consider, as before the first validation.
    """
    if state.best is None or state.carried is None:
        return state.best["step"] if state.best else state.carried
    entries = {entry["step"]: entry for entry in state.history}

    def rank(step: int) -> tuple[float, ...]:
        val_accuracy, val_loss = entries[step]["val_accuracy"], entries[step]["val_loss"]
        return (val_accuracy, -val_loss) if rule.metric == "accuracy" else (-val_loss,)

    return max(state.best["step"], state.carried, key=rank)  # `max` returns the first of two equal ranks


def summarize_phase(
    state: RunState, name: str, step: int, full_scores: Mapping[str, float] = MappingProxyType({})
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Summarize the finished phase `name`.

    Args:
        state: the run state at the end of the phase, before it is advanced to the next phase.
        name: name of the phase.
        step: step whose weights the phase ends with; it can belong to an earlier phase.
        full_scores: scores of these weights on the entire validation split, if epochs are scored on a fraction of it.
            They replace the epoch's scores, of which the summary retains `epoch_val_accuracy` and `epoch_val_n`.

    Returns:
        The summary, for the report and `state.finished`, and the history entry of `step`. If `step` belongs to an
        earlier phase, the summary has that phase's name as `kept_from`, and the validation accuracy of this phase's
        best epoch as `own_val_accuracy`.
    """
    assert state.best is not None
    phase_entries = [entry for entry in state.history if entry["phase"] == name]
    step_entry = next(entry for entry in state.history if entry["step"] == step)
    summary = {
        **{key: value for key, value in step_entry.items() if key.startswith("val_")},
        **full_scores,
        "epochs": len(phase_entries),
        "best_epoch": state.best["epoch"],
        "kept_step": step,
        "seconds": sum(entry["seconds"] for entry in phase_entries),
    }
    if full_scores:
        summary |= {f"epoch_{key}": step_entry[key] for key in ("val_accuracy", "val_n") if key in step_entry}
    if step_entry["phase"] != name:
        best_entry = next(entry for entry in phase_entries if entry["step"] == state.best["step"])
        summary |= {"kept_from": step_entry["phase"], "own_val_accuracy": best_entry["val_accuracy"]}
    return summary, step_entry


def describe_phase_end(
    name: str, summary: Mapping[str, Any], entry: Mapping[str, Any], weights: str, epoch: str
) -> list[str]:
    """Describe the end of a phase in one or two lines for the log.

    Args:
        name: name of the phase.
        summary, entry: the results of `summarize_phase`.
        weights: description of the weights that the run continues from, such as "the best weights".
        epoch: description of these weights' epoch, such as "epoch 3".
    """
    accuracy = f"{entry['val_accuracy']:.4f}"
    line = f"phase {name}: val_accuracy {accuracy}; continuing from {weights} ({epoch})"
    if "kept_from" in summary:
        line = f"phase {name}: best val_accuracy {summary['own_val_accuracy']:.4f}, not better than {accuracy} "
        line += f"before it; continuing from the weights of {entry['phase']} ({epoch})"
    if "epoch_val_accuracy" not in summary:
        return [line]
    return [line, f"  on all {summary['val_n']:,} validation examples: val_accuracy {summary['val_accuracy']:.4f}"]
