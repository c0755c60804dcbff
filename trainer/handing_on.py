"""The end of a phase: which of its weights go on."""

from __future__ import annotations

import numpy as np

from trainer.errors import DataError
from trainer.models.freezing import ThawPlan
from trainer.run import Run, from_chief, say
from trainer.training import variables
from trainer.training.early_stopping import best_step


def hand_on(job: Run, name: str, plan: ThawPlan) -> None:
    """Give the next phase, or the export, the weights that `training.keep` names: averaged ones where EMA is on."""
    state, config = job.state, job.config
    assert state.best is not None
    weights: dict[str, np.ndarray] = {}
    best = best_step(state, config.phases[name].early_stopping)
    chosen = best if config.training.keep == "best" and best is not None else state.step
    if job.peers.is_chief:
        chosen, values = read_or_last(job, chosen)
        weights = {n: values.get(f"ema/{n}", values[n]) for n in job.classifier.variables}
    chosen = job.peers.told("chosen", lambda: chosen)
    weights = from_chief(job, "weights", weights)
    variables.write(job.classifier.variables, weights, f"checkpoint step {chosen}")
    own = [entry for entry in state.history if entry["phase"] == name]
    kept = next(entry for entry in state.history if entry["step"] == chosen)
    best_own = next(entry for entry in own if entry["step"] == state.best["step"])
    spoilt = kept["phase"] != name
    state.finished[name] = {
        **{key: value for key, value in kept.items() if key.startswith("val_")},
        "epochs": len(own),
        "best_epoch": state.best["epoch"],
        "kept_step": chosen,
        "seconds": sum(entry["seconds"] for entry in own),
        "trainable_parameters": sum(int(np.prod(v.shape)) for v in plan.trainable.values()),
        **({"kept_from": kept["phase"], "own_val_accuracy": best_own["val_accuracy"]} if spoilt else {}),
    }
    epoch = f"epoch {kept['epoch']}{', averaged' if config.training.ema else ''}"
    if spoilt:
        say(f"phase {name}: val_accuracy {best_own['val_accuracy']:.4f} at best, it began with "
            f"{kept['val_accuracy']:.4f}: the weights of {kept['phase']} ({epoch}) go on")  # fmt: skip
    else:
        say(f"phase {name}: val_accuracy {kept['val_accuracy']:.4f}; the {config.training.keep} weights "
            f"({epoch}) go on")  # fmt: skip
    state.phase, state.phase_step, state.best, state.bad_epochs = state.phase + 1, 0, None, 0
    state.carried = chosen if config.training.keep == "best" else None


def read_or_last(job: Run, chosen: int) -> tuple[int, dict[str, np.ndarray]]:
    """The variables of a checkpoint, or of the last one where it is damaged; and which of the two it was."""
    try:
        return chosen, job.checkpoints.read(chosen)[1]
    except DataError as error:
        if chosen == job.state.step:
            raise
        say(f"{error}; the last weights go on instead")
    return job.state.step, job.checkpoints.read(job.state.step)[1]
