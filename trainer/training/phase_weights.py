"""Which weights go on after a phase, to the next one or to the export."""

from typing import Any

from trainer.config.phases import EarlyStopping
from trainer.training.state import RunState


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


def select_phase_weights(state: RunState, rule: EarlyStopping, keep: str) -> int:
    """The step whose weights the next phase starts from: the best one, or the last where `training.keep` is last.

    A phase that never beat what it began with has no best of its own (`best_step`).
    """
    best = best_step(state, rule)
    return best if keep == "best" and best is not None else state.step


def summarise_phase(state: RunState, name: str, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record of a finished phase whose weights are those of `step`, and that step's entry of the history.

    Where these are the weights of an earlier phase, `kept_from` names it beside the best accuracy of the phase itself.
    """
    assert state.best is not None
    own = [entry for entry in state.history if entry["phase"] == name]
    chosen = next(entry for entry in state.history if entry["step"] == step)
    best_own = next(entry for entry in own if entry["step"] == state.best["step"])
    summary = {
        **{key: value for key, value in chosen.items() if key.startswith("val_")},
        "epochs": len(own),
        "best_epoch": state.best["epoch"],
        "kept_step": step,
        "seconds": sum(entry["seconds"] for entry in own),
    }
    if chosen["phase"] != name:
        summary |= {"kept_from": chosen["phase"], "own_val_accuracy": best_own["val_accuracy"]}
    return summary, chosen
