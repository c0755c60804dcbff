"""One run, from a configuration to a report and a model that serves. Read it top to bottom."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import tensorflow as tf

from trainer.cluster.control import BEAT_SECONDS, SILENCE_SECONDS, Peers
from trainer.cluster.signals import StopFlag
from trainer.config.schema import Phase, RunConfig
from trainer.data.images import data_errors
from trainer.data.shard_gate import Gate
from trainer.errors import BUG, Diverged, Interrupted, ToldToStop, TrainerError
from trainer.evaluation.scoring import validation_scores
from trainer.features.cache import Inputs, choose_features, open_inputs
from trainer.handing_on import hand_on
from trainer.models.freezing import ThawPlan, apply_thaw
from trainer.monitoring.health import signs
from trainer.run import Run, again, say, score, step_settings, steps_of, training_stream
from trainer.runs.folder import RunFolder
from trainer.start import open_run, resume, share_data
from trainer.teaching import find_teacher
from trainer.training import variables
from trainer.training.early_stopping import best_step, exhausted, judge
from trainer.training.optimizers import build_optimizer, build_schedule
from trainer.training.step import TrainingStep


def run(config: RunConfig, home: RunFolder, peers: Peers, stop: StopFlag, began: float) -> None:
    """Train, evaluate, report and export, or go on where `home` was left. All workers run this, in step.

    Args:
        began: time.time() at which the process started, for the account of where the time went.

    Raises:
        TrainerError: with a message for the user and the exit code of the process.
    """
    job = open_run(config, home, peers, stop, began)
    with failures_noted(job):
        resume(job, home)
        choose_features(job)
        share_data(job)
        find_teacher(job)
        job.state.starts += 1
        job.ledger.mark("start")
        names = list(job.config.phases)
        while job.state.phase < len(names):
            if job.told_to_stop("before a phase"):  # to compile it may take longer than the time there is to stop
                leave(job, "between phases")
            train_phase(job, names[job.state.phase])
        job.ledger.mark("train")
        from trainer.finish import finish  # scikit-learn and matplotlib: seconds that the first step need not wait for

        finish(job)


@contextmanager
def failures_noted(job: Run) -> Iterator[None]:
    """Around the run: however it ends, the account is closed and beside the checkpoints stands why."""

    def ended(code: int, reason: str) -> None:
        job.attempts.failed(code, reason)
        job.ledger.write()

    job.peers.on_end = ended
    job.stop.on_told = job.note_stop
    try:
        yield
    except OSError as error:
        text = f"{job.address}: {error.strerror or error}; what was saved before is intact. {again(job)}"
        ended(Interrupted.exit_code, text)
        raise Interrupted(text) from error
    except tf.errors.OpError as error:
        if job.peers.size > 1:  # a collective that failed: the peers' own connections soon say whose fault it is
            time.sleep(SILENCE_SECONDS + 2 * BEAT_SECONDS)
        ended(BUG, str(error))
        raise
    except TrainerError as error:
        ended(error.exit_code, str(error))
        raise
    finally:
        job.telemetry.close()
        job.publisher.close()
        if job.shards:
            job.shards.close()


# ---------------------------------------------------------------------------------------------------------------
# One phase
# ---------------------------------------------------------------------------------------------------------------


def train_phase(job: Run, name: str) -> None:
    """Thaw what the phase names, train it to its end, and hand its weights on."""
    phase, state, config = job.config.phases[name], job.state, job.config
    total = steps_of(phase, config, job.steps_per_epoch)
    signs.enter(name)
    plan = apply_thaw(job.classifier, phase.thaw, phase.batch_norm, phase.backbone_rate, phase.layer_decay)
    say(f"phase {name}: {total} steps ({total / job.steps_per_epoch:.3g} epochs), {phase.optimizer.name} "
        f"{phase.optimizer.learning_rate:g} {phase.schedule.name}")  # fmt: skip
    for line in plan.lines():
        say(f"  {line}")
    validated = state.epoch_step == 0  # not so where a signal came between the last step and its validation
    if not (validated and (state.phase_step >= total or exhausted(state, phase.early_stopping))):
        train_epochs(job, name, plan, total)
    job.loaded = {}
    hand_on(job, name, plan)


def train_epochs(job: Run, name: str, plan: ThawPlan, total: int) -> None:
    """What is left of a phase: epoch after epoch, each with its validation."""
    phase, state = job.config.phases[name], job.state
    inputs = open_inputs(job, name)
    if inputs is None:
        leave(job, "while features were computed")
    step, rate = compile_step(job, phase, plan, inputs, total)
    if job.loaded:
        variables.write(step.checkpointed(), job.loaded, f"checkpoint step {state.step}")
        job.loaded = {}
    everything = job.classifier.variables | step.checkpointed()

    stream, shards = training_stream(job, inputs.training, inputs.augmentation, inputs.views)
    batches = iter(stream)
    job.telemetry.restart_clock()
    over = False
    while not over:
        with data_errors(inputs.training):
            train_epoch(job, name, step, rate, batches, shards, total, everything)
        entry, best = validate(job, name, step, inputs, everything, float(rate(state.phase_step)))
        state.history.append(entry)
        state.epoch, state.epoch_step, state.sums = state.epoch + 1, 0, [0.0, 0.0, 0.0]
        over = state.phase_step >= total or exhausted(state, phase.early_stopping)
        if best or over or due(job):
            save(job, everything)
        if over and state.phase_step < total:
            patience = phase.early_stopping.patience
            say(f"phase {name}: no better {phase.early_stopping.metric} in {patience} epochs, stopping early")
        if job.told_to_stop("after an epoch"):
            save_and_leave(job, everything)
    del batches  # from here on nothing reads ahead
    shards.close()


def compile_step(job: Run, phase: Phase, plan: ThawPlan, inputs: Inputs, total: int) -> tuple[TrainingStep, Any]:
    """The phase's step on the device, and its learning rate as a function of the phase's step."""
    rate = build_schedule(
        phase.schedule,
        phase.optimizer.learning_rate,
        total_steps=total,
        steps_per_epoch=job.steps_per_epoch,
        batch_size=job.config.training.batch_size,
    )
    with job.strategy.scope():
        optimizer = build_optimizer(phase.optimizer, rate, plan.lr_multipliers)
    step = TrainingStep(
        job.strategy,
        inputs.network,
        plan.trainable,
        optimizer,
        step_settings(job, plan.batch_norm_training),
        stop=job.wishes_to_stop,
        teacher=job.teacher,
    )
    return step, rate


def train_epoch(
    job: Run,
    name: str,
    step: TrainingStep,
    rate: Any,
    batches: Any,
    shards: Gate,
    total: int,
    everything: dict[str, Any],
) -> None:
    """The steps of one epoch, in calls of several; a call ends early, on all workers, when one was told to stop."""
    state, runtime = job.state, job.config.runtime
    left = min(job.steps_per_epoch - state.epoch_step, total - state.phase_step)
    log_every = runtime.log_every.steps(job.steps_per_epoch, job.config.training.batch_size)
    window = job.config.debug.profile_steps
    while left > 0:
        job.telemetry.profile(state.step, window)
        traced = step.traced
        wanted = min(runtime.steps_per_call if traced else 1, left, log_every - state.step % log_every)
        late = wait_for_shards(job, shards, wanted, everything)
        signs.at("training" if traced else "compiling the first step")
        rows, waited, stopped = step.run(batches, wanted, state.step, state.phase_step)
        waited += late
        job.ledger.mark("train" if traced else "compile", waited)
        count = len(rows)
        left -= count
        state.step += count
        state.phase_step += count
        state.epoch_step += count
        signs.stepped(state.step, state.epoch + 1)
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
        state.images += float(rows[:, 2].sum())
        job.telemetry.waited(waited)
        if state.step % log_every == 0 or left == 0:
            loss, right, seen = state.interval
            entry = {"phase": name, "epoch": state.epoch + 1, "step": state.step, "loss": loss / seen,
                     "accuracy": right / seen, "learning_rate": float(rate(state.phase_step - 1))}  # fmt: skip
            job.telemetry.interval(entry, seen, job.ledger.goodput)
            state.interval = [0.0, 0.0, 0.0]
            job.publisher.check()
            if left and due(job) and not stopped:
                save(job, everything)
        if stopped:
            save_and_leave(job, everything)
    job.telemetry.profile(state.step, window)


def wait_for_shards(job: Run, shards: Gate, steps: int, everything: dict[str, Any]) -> float:
    """Until all that the next steps can read is on disk: seconds. Told to stop meanwhile, a worker alone saves first;
    one of several ends as it is, for the others may be inside a step that needs it.
    """
    try:
        return shards.before(steps * job.config.training.batch_size // job.share.workers)
    except ToldToStop:
        if job.peers.size > 1:
            raise
        save_and_leave(job, everything)


def validate(
    job: Run, name: str, step: TrainingStep, inputs: Inputs, everything: dict[str, Any], rate: float
) -> tuple[dict[str, Any], bool]:
    """Score the validation split; returns the epoch's entry of the history, and whether it is the phase's best."""
    state, began = job.state, time.monotonic()
    job.ledger.mark("train")
    signs.at("validation")
    if step.averages:
        step.averages.swap()
    try:
        batch_size, part = job.config.training.batch_size, job.config.training.validation_share
        probabilities, labels, _ = score(job, inputs.evaluator, inputs.validation, batch_size, "validation", part)
    finally:
        if step.averages:
            step.averages.swap()
    if job.told_to_stop("in validation"):
        save_and_leave(job, everything)
    scores = job.peers.told("validation", lambda: validation_scores(probabilities, labels))
    entry = {"phase": name, "epoch": state.epoch + 1, "step": state.step, "loss": state.sums[0] / state.sums[2],
             "accuracy": state.sums[1] / state.sums[2], **scores, "learning_rate": rate}  # fmt: skip
    best = judge(state, entry, job.config.phases[name].early_stopping)
    seconds = time.monotonic() - began
    job.ledger.mark("evaluation")
    spent = job.ledger.seconds["train"] - sum(e["seconds"] for e in state.history)
    job.telemetry.epoch(entry, {"seconds": spent, "validation_seconds": seconds}, best)
    job.telemetry.restart_clock()
    return {**entry, "seconds": spent}, best


# ---------------------------------------------------------------------------------------------------------------
# Saving and stopping
# ---------------------------------------------------------------------------------------------------------------


def due(job: Run) -> bool:
    """Whether it is time for a checkpoint."""
    every = job.config.runtime.checkpoint_every.steps(job.steps_per_epoch, job.config.training.batch_size)
    return job.state.step - job.saved_step >= max(every, 1)


def save(job: Run, everything: dict[str, Any]) -> None:
    """Commit a checkpoint of where the run stands now. The chief alone writes; the others need not wait for it."""
    state = job.state
    job.saved_step = state.step
    if not job.peers.is_chief:
        return
    job.ledger.mark("train")
    signs.at("saving a checkpoint")
    state.train_seconds = job.ledger.seconds["train"]
    job.telemetry.flush()
    job.publisher.wait()  # at most one checkpoint is behind
    with job.peers.committing():
        rule = list(job.config.phases.values())[state.phase].early_stopping
        best = best_step(state, rule)
        job.checkpoints.save(state.to_json(), variables.read(everything), best)
    job.publisher.checkpoint()
    job.ledger.mark("checkpoint")
    job.telemetry.restart_clock()


def save_and_leave(job: Run, everything: dict[str, Any]) -> NoReturn:
    """After a signal, on all workers: save, then end with the code that means "start me again"."""
    if job.saved_step != job.state.step:
        save(job, everything)
    job.publisher.wait()
    job.peers.barrier("saved")
    leave(job, f"at step {job.state.step}")


def leave(job: Run, where: str) -> NoReturn:
    """All workers at the same point: each ends for itself, with everything saved."""
    job.peers.leave()
    reason = job.stop.reason or "told to stop by another worker"
    raise ToldToStop(f"{reason} {where}; everything is saved. {again(job)}")
