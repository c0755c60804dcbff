"""One run, from a configuration to a report and a model that serves. Read it top to bottom."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.config import Phase, RunConfig
from trainer.data.pipeline import training_batches
from trainer.data.pixels import data_errors
from trainer.errors import DataError, Diverged, Interrupted
from trainer.finish import finish
from trainer.models.freezing import ThawPlan, apply_thaw
from trainer.run import Run, again, predict, say, steps_of
from trainer.start import open_run, resume
from trainer.training import variables
from trainer.training.optimizers import build_optimizer, build_schedule
from trainer.training.run_folder import RunFolder
from trainer.training.step import StepSettings, TrainingStep, mean_loss_and_accuracy
from trainer.training.stopping import exhausted, judge


def run(config: RunConfig, home: RunFolder) -> None:
    """Train, evaluate, report and export, or go on where `home` was left.

    Raises:
        TrainerError: with a message for the user and the exit code of the process.
    """
    started = time.monotonic()
    job = open_run(config, home)
    try:
        resume(job, home)
        job.state.add("starts", 1)
        job.state.add("start_seconds", time.monotonic() - started)
        names = list(config.phases)
        while job.state.phase < len(names):
            train_phase(job, names[job.state.phase])
        finish(job)
    except OSError as error:
        raise Interrupted(
            f"{job.folder}: {error.strerror or error}; what was saved before is intact. {again(job)}"
        ) from error
    finally:
        job.telemetry.close()


# ---------------------------------------------------------------------------------------------------------------
# One phase
# ---------------------------------------------------------------------------------------------------------------


def train_phase(job: Run, name: str) -> None:
    """Thaw what the phase names, train it to its end, and hand its weights on."""
    phase, state, config = job.config.phases[name], job.state, job.config
    total = steps_of(phase, config, job.steps_per_epoch)
    plan = apply_thaw(job.classifier, phase.thaw, phase.batch_norm)
    say(f"phase {name}: {total} steps ({total / job.steps_per_epoch:.3g} epochs), {phase.optimizer.name} "
        f"{phase.optimizer.learning_rate:g} {phase.schedule.name}")  # fmt: skip
    for line in plan.lines():
        say(f"  {line}")

    step, rate = compile_step(job, phase, plan, total)
    if job.loaded:
        variables.write(step.checkpointed(), job.loaded, f"checkpoint step {state.step}")
        job.loaded = {}
    everything = job.classifier.variables | step.checkpointed()

    batches = iter(job.strategy.distribute_datasets_from_function(lambda _: stream(job)))
    job.telemetry.restart_clock()
    validated = state.epoch_step == 0  # not so where a signal came between the last step and its validation
    over = validated and (state.phase_step >= total or exhausted(state, phase.early_stopping))
    while not over:
        with data_errors(job.pixels("train")):
            train_epoch(job, name, step, rate, batches, total, everything)
        entry, best = validate(job, name, step, everything, float(rate(state.phase_step)))
        state.history.append(entry)
        state.epoch, state.epoch_step, state.sums = state.epoch + 1, 0, [0.0, 0.0, 0.0]
        over = state.phase_step >= total or exhausted(state, phase.early_stopping)
        if best or over or due(job):
            save(job, everything)
        if over and state.phase_step < total:
            patience = phase.early_stopping.patience
            say(f"phase {name}: no better {phase.early_stopping.metric} in {patience} epochs, stopping early")
        stop_if_told(job, everything)
    hand_on(job, name, plan)


def compile_step(job: Run, phase: Phase, plan: ThawPlan, total: int) -> tuple[TrainingStep, Any]:
    """The phase's step on the device, and its learning rate as a function of the phase's step."""
    training, runtime = job.config.training, job.config.runtime
    rate = build_schedule(
        phase.schedule,
        phase.optimizer.learning_rate,
        total_steps=total,
        steps_per_epoch=job.steps_per_epoch,
        batch_size=training.batch_size,
    )
    settings = StepSettings(
        seed=job.config.seed,
        label_smoothing=training.label_smoothing,
        class_weights=weights_of_classes(job),
        clip_norm=training.clip_norm,
        accumulate=training.accumulate,
        ema=training.ema,
        batch_norm_training=plan.batch_norm_training,
        loss_scaling=runtime.precision == "float16",
        xla=runtime.xla,
    )
    with job.strategy.scope():
        optimizer = build_optimizer(phase.optimizer, rate)
    return TrainingStep(job.strategy, job.classifier, plan.trainable, optimizer, settings), rate


def weights_of_classes(job: Run) -> tuple[float, ...] | None:
    """One loss weight a class; "balanced" is n / (classes * count), as scikit-learn has it."""
    given, names = job.config.training.class_weights, job.dataset.class_names
    if given == "none":
        return None
    if given == "balanced":
        counts = np.bincount(job.dataset.splits["train"].labels, minlength=len(names))
        return tuple(float(w) for w in counts.sum() / (len(names) * np.maximum(counts, 1)))
    assert isinstance(given, dict)
    strange = sorted(set(given) - set(names))
    if strange:
        raise DataError(f"training.class_weights names {', '.join(strange)}; the classes are {', '.join(names)}")
    return tuple(float(given.get(name, 1.0)) for name in names)


def stream(job: Run) -> tf.data.Dataset:
    """Training batches from the state's position on, endless."""
    config = job.config
    return training_batches(
        job.pixels("train"),
        batch_size=config.training.batch_size,
        replicas=job.strategy.num_replicas_in_sync,
        seed=config.seed,
        window=config.data.shuffle_window,
        augmentation=config.augmentation,
        first_epoch=job.state.epoch,
        first_step=job.state.epoch_step,
        threads=config.runtime.data_threads,
    )


def train_epoch(
    job: Run, name: str, step: TrainingStep, rate: Any, batches: Any, total: int, everything: dict[str, Any]
) -> None:
    """The steps of one epoch, in calls of several; stops at once when told to."""
    state, runtime = job.state, job.config.runtime
    left = min(job.steps_per_epoch - state.epoch_step, total - state.phase_step)
    log_every = runtime.log_every.steps(job.steps_per_epoch, job.config.training.batch_size)
    window = job.config.debug.profile_steps
    per_call = 1  # the first call also traces
    while left > 0:
        job.telemetry.profile(state.step, window)
        count, began = min(per_call, left, log_every - state.step % log_every), time.monotonic()
        rows, waited = step.run(batches, count, state.step, state.phase_step)
        seconds = time.monotonic() - began
        # A call is short enough that a signal is answered within about a second.
        per_call = max(1, min(runtime.steps_per_call, int(count / max(seconds, 1e-3))))
        left -= count
        state.step += count
        state.phase_step += count
        state.epoch_step += count
        if not np.isfinite(rows).all():
            first = state.step - count + 1 + int(np.argmax(~np.isfinite(rows).all(-1)))
            raise Diverged(
                f"the loss is not finite at step {first} (phase {name}, epoch {state.epoch + 1}, between the steps "
                f"{state.step - count + 1} and {state.step}); lower phases.{name}.optimizer.learning_rate, "
                "or set training.clip_norm=1"
            )
        for row in rows.astype(np.float64):
            state.sums = [a + float(b) for a, b in zip(state.sums, row, strict=True)]
            state.interval = [a + float(b) for a, b in zip(state.interval, row, strict=True)]
        state.add("train_seconds", seconds)
        state.add("wait_seconds", waited)
        state.add("images", float(rows[:, 2].sum()))
        job.telemetry.waited(waited)
        if state.step % log_every == 0 or left == 0:
            loss, right, seen = state.interval
            entry = {"phase": name, "epoch": state.epoch + 1, "step": state.step, "loss": loss / seen,
                     "accuracy": right / seen, "learning_rate": float(rate(state.phase_step - 1))}  # fmt: skip
            job.telemetry.interval(entry, seen)
            state.interval = [0.0, 0.0, 0.0]
            if left and due(job):
                save(job, everything)
        stop_if_told(job, everything)
    job.telemetry.profile(state.step, window)


def validate(
    job: Run, name: str, step: TrainingStep, everything: dict[str, Any], rate: float
) -> tuple[dict[str, Any], bool]:
    """Score the validation split; returns the epoch's entry of the history, and whether it is the phase's best."""
    state, began = job.state, time.monotonic()
    if step.averages:
        step.averages.swap()
    try:
        probabilities, labels, _ = predict(job, "validation", job.config.training.validation_share)
    finally:
        if step.averages:
            step.averages.swap()
    stop_if_told(job, everything)
    val_loss, val_accuracy = mean_loss_and_accuracy(probabilities, labels)
    entry = {"phase": name, "epoch": state.epoch + 1, "step": state.step, "loss": state.sums[0] / state.sums[2],
             "accuracy": state.sums[1] / state.sums[2], "val_loss": val_loss, "val_accuracy": val_accuracy,
             "val_n": len(labels), "learning_rate": rate}  # fmt: skip
    best = judge(state, entry, job.config.phases[name].early_stopping)
    seconds = time.monotonic() - began
    state.add("evaluation_seconds", seconds)
    spent = state.totals["train_seconds"] - sum(e["seconds"] for e in state.history)
    job.telemetry.epoch(entry, {"seconds": spent, "validation_seconds": seconds}, best)
    job.telemetry.restart_clock()
    return {**entry, "seconds": spent}, best


def hand_on(job: Run, name: str, plan: ThawPlan) -> None:
    """Give the next phase, or the export, the weights that `training.keep` names: averaged ones where EMA is on."""
    state, config = job.state, job.config
    assert state.best is not None
    chosen = state.best["step"] if config.training.keep == "best" else state.step
    try:
        _, values = job.checkpoints.read(chosen)
    except DataError as error:
        if chosen == state.step:
            raise
        say(f"{error}; the last weights go on instead")
        chosen = state.step
        _, values = job.checkpoints.read(chosen)
    weights = {n: values.get(f"ema/{n}", values[n]) for n in job.classifier.variables}
    variables.write(job.classifier.variables, weights, f"checkpoint step {chosen}")
    own = [entry for entry in state.history if entry["phase"] == name]
    kept = next(entry for entry in own if entry["step"] == chosen)
    state.finished[name] = {
        "val_accuracy": kept["val_accuracy"],
        "val_loss": kept["val_loss"],
        "epochs": len(own),
        "best_epoch": state.best["epoch"],
        "kept_step": chosen,
        "seconds": sum(entry["seconds"] for entry in own),
        "trainable_parameters": sum(int(np.prod(v.shape)) for v in plan.trainable.values()),
        "val_n": kept["val_n"],
    }
    say(f"phase {name}: val_accuracy {kept['val_accuracy']:.4f}; the {config.training.keep} weights "
        f"(epoch {kept['epoch']}{', averaged' if config.training.ema else ''}) go on")  # fmt: skip
    state.phase, state.phase_step, state.best, state.bad_epochs = state.phase + 1, 0, None, 0


# ---------------------------------------------------------------------------------------------------------------
# Saving and stopping
# ---------------------------------------------------------------------------------------------------------------


def due(job: Run) -> bool:
    """Whether it is time for a checkpoint."""
    every = job.config.runtime.checkpoint_every.steps(job.steps_per_epoch, job.config.training.batch_size)
    return job.state.step - job.saved_step >= max(every, 1)


def save(job: Run, everything: dict[str, Any]) -> None:
    """Commit a checkpoint of where the run stands now."""
    began = time.monotonic()
    best = job.state.best
    job.telemetry.flush()
    job.checkpoints.save(job.state.to_json(), variables.read(everything), best["step"] if best else None)
    job.saved_step = job.state.step
    job.state.add("checkpoint_seconds", time.monotonic() - began)
    job.telemetry.restart_clock()


def stop_if_told(job: Run, everything: dict[str, Any]) -> None:
    """After a signal: save, then end with the code that means "start me again"."""
    if job.stop.reason:
        if job.saved_step != job.state.step:
            save(job, everything)
        raise Interrupted(f"{job.stop.reason} at step {job.state.step}; everything is saved. {again(job)}")
