"""The state of a run and of its current phase on one worker; open and score a phase, and record how a run ends."""

import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

import tensorflow as tf

from trainer.cluster.control import HEARTBEAT_INTERVAL_SECONDS, HEARTBEAT_TIMEOUT_SECONDS, ControlChannel
from trainer.cluster.devices import detect_device
from trainer.cluster.signals import end_without_progress
from trainer.cluster.worker import Worker
from trainer.config.schema import Phase, RunConfig
from trainer.config.typed import format_argument
from trainer.data.images import BatchSource, ImageStore
from trainer.data.order import Order
from trainer.data.pipeline import build_training_batches, prefetch_to_device
from trainer.data.shard_gate import ShardGate, ShardGates
from trainer.data.sharding import ShardingPlan, plan_sharding, require_resumable
from trainer.distillation.own_teacher import locate_teacher
from trainer.distillation.teacher import OpenedTeacher
from trainer.distillation.teacher_files import read_scores
from trainer.errors import BUG, INTERRUPTED, DataError, Interrupted, StopRequested, TrainerError
from trainer.evaluation.scoring import Scorer, compute_validation_scores
from trainer.features.inputs import Inputs, open_inputs, switch_to_images
from trainer.features.plan import FeaturePlan
from trainer.models.classifier import Classifier
from trainer.models.freezing import FreezingPlan
from trainer.monitoring.health import health
from trainer.monitoring.log import log
from trainer.runs.clock import Clock
from trainer.runs.folder import RunFolder
from trainer.runs.metrics import MetricsWriter
from trainer.runs.restarts import STOPPED
from trainer.runs.saver import Saver
from trainer.storage.disk import translate_disk_errors
from trainer.training.optimizers import build_optimizer, build_schedule
from trainer.training.state import RunState
from trainer.training.step import StepSettings, TrainingStep, require_plausible


@dataclass
class RunPlan:
    """The decisions that each start (process) of a run makes before its first training step."""

    features: FeaturePlan
    compiled: dict[str, bool]  # phase name -> whether XLA compiles the training step
    sharding: ShardingPlan
    teacher: OpenedTeacher | None  # None without distillation


@dataclass
class RunContext:
    """The objects of a run on one worker. `plan` and `scorer` are set later, in trainer.train."""

    config: RunConfig
    worker: Worker
    images: ImageStore
    classifier: Classifier
    state: RunState
    saver: Saver
    clock: Clock
    metrics: MetricsWriter
    plan: RunPlan = field(init=False)
    scorer: Scorer = field(init=False)


@dataclass
class PhaseRun:
    """The compiled training step, the learning-rate schedule and the input pipeline of one phase."""

    name: str
    phase: Phase
    total_steps: int  # maximum number of steps; early stopping can end the phase earlier
    step: TrainingStep
    schedule: Any  # function: step within the phase -> learning rate
    inputs: Inputs
    batches: Any  # iterator over global batches
    gate: ShardGate | ShardGates  # waits for the shards of the next batches
    checkpoint_variables: dict[str, Any]  # name -> variable of the model or the training step


def plan_run_sharding(run: RunContext, image_cache: str = "none") -> ShardingPlan:
    """Choose how the workers shard the training split.

    `image_cache`: where decoded images are cached ("memory", "disk" or "none"), or "features" if images are read only
    once, to compute features. It has no effect on a resumed run.
    """
    config, split, training = run.config, run.images.dataset.splits["train"], run.config.training
    return plan_sharding(
        config.data.shard_by, split, run.worker.size, training.batch_size, image_cache, run.state.sharding,
        training.virtual_replicas,
    )  # fmt: skip


def resume_sharding(run: RunContext) -> ShardingPlan | None:
    """Plan the sharding of a run that resumes from a checkpoint. Return None if the checkpoint has no sharding.

    Raises:
        ConfigError: the number of workers has changed, and the run cannot resume with the new sharding.
    """
    if not run.state.sharding:
        return None
    sharding = plan_run_sharding(run)
    require_resumable(sharding, run.state.sharding, run.state.epoch_step)
    return sharding


def broadcast_sharding(run: RunContext, image_cache: str) -> ShardingPlan:
    """Plan the sharding on the chief, and return the chief's plan. All workers must call this."""
    return ShardingPlan(**run.worker.control.broadcast("sharding", lambda: asdict(plan_run_sharding(run, image_cache))))


def show_phase(run: RunContext, name: str, total_steps: int) -> None:
    """Show a phase in the progress display, with its number of steps and the number of its last epoch."""
    state, steps_per_epoch = run.state, run.plan.sharding.steps_per_epoch
    last_epoch = state.epoch - state.phase_step // steps_per_epoch + -(-total_steps // steps_per_epoch)
    run.metrics.enter_phase(
        name, step=state.step, phase_step=state.phase_step, steps=total_steps, last_epoch=last_epoch
    )


def is_checkpoint_due(run: RunContext) -> bool:
    """Return whether `runtime.checkpoint_every` has passed since the last checkpoint."""
    steps_per_epoch, batch_size = run.plan.sharding.steps_per_epoch, run.config.training.batch_size
    steps_between_checkpoints = run.config.runtime.checkpoint_every.steps(steps_per_epoch, batch_size)
    return run.state.step - run.saver.saved_step >= max(steps_between_checkpoints, 1)


def raise_stopped(run: RunContext, when: str) -> NoReturn:
    """Disconnect from the other workers, which stop at the same step, and raise StopRequested.

    `when` completes the message: "SIGTERM WHEN; everything is saved".
    """
    run.worker.control.disconnect()
    reason = run.worker.stop.reason or "stopped by another worker"
    raise StopRequested(f"{reason} {when}; everything is saved", fix=run.saver.resume_hint)


@contextmanager
def advise_export(output_dir: str) -> Iterator[None]:
    """Add to a DataError raised in this block how to export the weights of the run in `output_dir` nevertheless."""
    try:
        yield
    except DataError as error:
        command = f"python -m trainer.export {format_argument('run', output_dir)} data.on_error=skip"
        reason = "this run, which is trained, accepts no other data"
        error.fix = f"{error.fix or 'repair the data'}; {reason}: then export it with {command}"
        raise


@contextmanager
def _wait_for_lost_peers(control: ControlChannel) -> Iterator[None]:
    """If there are several workers, delay a TensorFlow error by the heartbeat timeout.

    The cause of the error may be a lost peer, which TensorFlow can detect before the control channel does. Within the
    timeout, the control channel detects the loss too, and ends the process with exit code 75.
    """
    try:
        yield
    except tf.errors.OpError:
        if control.size > 1:  # a collective operation may have failed
            time.sleep(HEARTBEAT_TIMEOUT_SECONDS + 2 * HEARTBEAT_INTERVAL_SECONDS)
        raise


@contextmanager
def abandon_on_error(folder: RunFolder, control: ControlChannel) -> Iterator[None]:
    """If this block fails, record the error in the folder, and release the folder."""
    try:
        with _wait_for_lost_peers(control):
            yield
    except BaseException as error:
        folder.abandon(error)
        raise


@contextmanager
def record_failures(run: RunContext, folder: RunFolder) -> Iterator[None]:
    """Record the reason and the time breakdown if this block fails or is stopped. Always close the run's files.

    Before `RunFolder.record_start`, only the end of this start is recorded. TensorFlow's errors, `TrainerError` and
    `OSError` are recorded; other exceptions are not.

    Raises:
        Interrupted: replaces an `OSError` and errors caused by a full disk, because a restart may succeed.
    """
    control, stop, saver = run.worker.control, run.worker.stop, run.saver

    def record(code: int, reason: str) -> None:
        """Record how this start ends: its exit code and the reason."""
        if folder.start_recorded:
            saver.restarts.record_failure(code, reason)
            with suppress(OSError):  # the disk may have the same problem as before
                run.clock.write()
        else:
            folder.record_exit(code, reason, stopped=stop.reason is not None)

    def on_request(reason: str) -> None:
        """Record a stop request. End a stalled process immediately, because it would not reach the next step."""
        if stalled := health.describe_stall():
            control.end(INTERRUPTED, f"{reason} while {stalled}; checkpoints are intact; {saver.resume_hint}")
        saver.restarts.end(STOPPED, reason)  # now, because the process may be killed before it has saved
        timeout = f"{reason}, but the current step did not end in time; checkpoints are intact; {saver.resume_hint}"
        end_without_progress(control.end, timeout)

    control.on_end, stop.on_request = record, on_request
    folders = saver.path, run.config.runtime.cache_folder
    try:
        translated = translate_disk_errors(folders, "checkpoints are intact", f"make space there. {saver.resume_hint}")
        with _wait_for_lost_peers(control), translated:
            yield
    except OSError as error:
        problem = f"{saver.address}: {error.strerror or error}; checkpoints are intact"
        interrupted = Interrupted(problem, fix=saver.resume_hint)
        record(INTERRUPTED, str(interrupted))
        raise interrupted from error
    except tf.errors.OpError as error:
        record(BUG, str(error))
        raise
    except TrainerError as error:
        record(error.exit_code, str(error))
        raise
    finally:
        run.metrics.close()
        saver.publisher.close()
        run.images.close()
        if not folder.start_recorded:
            folder.abandon(sys.exception())


def open_phase(run: RunContext, name: str, freezing: FreezingPlan, total_steps: int) -> PhaseRun:
    """Open the inputs of a phase, and build its learning-rate schedule, optimizer, training step and batches.

    The batches start at the current step of the current epoch.

    Args:
        name: name of the phase.
        freezing: the phase's trainable variables and their learning-rate multipliers.
        total_steps: maximum number of steps of the phase.
    """
    config, state, worker, phase = run.config, run.state, run.worker, run.config.phases[name]
    if state.phase:
        gc.collect()  # deletes the graphs of the phase before; Python itself collects garbage rarely (cli/process.py)
    inputs = open_phase_inputs(run, name)
    teacher = run.plan.teacher
    batch_size, steps_per_epoch = config.training.batch_size, run.plan.sharding.steps_per_epoch
    lr = phase.optimizer.learning_rate
    schedule = build_schedule(
        phase.schedule, lr, total_steps=total_steps, steps_per_epoch=steps_per_epoch, batch_size=batch_size
    )
    with worker.strategy.scope():
        optimizer = build_optimizer(phase.optimizer, schedule, freezing.lr_multipliers)
    on_gpu = detect_device().kind == "GPU"
    settings = StepSettings.from_config(
        config, run.images.dataset, freezing.batch_norm_training, run.plan.compiled[name],
        polls_each_step=not on_gpu or worker.size > 1, phase=state.phase,
    )  # fmt: skip
    logits = teacher.network.logits if teacher and teacher.network else None  # None if batches have soft labels
    step = TrainingStep(
        worker.strategy, inputs.network, freezing.trainable, optimizer, settings,
        should_stop=worker.stop_requested, teacher=logits,
    )  # fmt: skip
    # The order of the examples depends only on the seed and the epoch, so a resumed epoch continues in the same order.
    order = Order(
        batch_size=batch_size,
        seed=config.seed,
        window=config.data.shuffle_window,
        first_epoch=state.epoch,
        first_step=state.epoch_step,
        sharding=run.plan.sharding.for_worker(worker.index),
    )
    batches = build_training_batches(
        inputs.training, order, num_replicas=worker.replicas, augmentation=inputs.augmentation, num_views=inputs.views
    )
    dataset = teacher.add_soft_labels(batches.dataset) if teacher else batches.dataset
    if on_gpu and worker.replicas == 1:  # with several replicas, the strategy prefetches
        dataset = prefetch_to_device(dataset, "GPU:0")
    iterator = iter(worker.strategy.distribute_datasets_from_function(lambda _: dataset))
    return PhaseRun(
        name, phase, total_steps, step=step, schedule=schedule, inputs=inputs, batches=iterator,
        gate=batches.open_gate(),
        checkpoint_variables=run.classifier.variables | step.checkpoint_variables(),
    )  # fmt: skip


def open_phase_inputs(run: RunContext, name: str) -> Inputs:
    """Open a phase's cached features or images. Use images if there is no space to cache the features.

    Raises:
        Interrupted: the phase began with cached features, and there is no space for them now.
        StopRequested: a stop was requested while features were computed.
    """
    category = "compile" if run.plan.features.input_kinds[name] == "live" else "features"
    with run.clock.span(category, "computing features" if category == "features" else "opening the training images"):
        inputs = open_inputs(name, run.worker, run.images, run.classifier, run.plan.features, run.scorer)
    if inputs is not None:
        return inputs
    if run.worker.should_stop(when := "while computing features"):
        raise_stopped(run, when)
    if run.state.phase_step:
        problem = f"phase {name} began with cached features, but there is no space for them"
        hint = run.saver.resume_hint
        fix = f"increase runtime.disk_budget_gb or runtime.memory_budget_gb, or set runtime.cache_dir; {hint}"
        raise Interrupted(problem, fix=fix)
    log.info(f"features of phase {name}: live, because there is no space for a cache")
    switch_to_images(name, run.images, run.plan.features)
    if run.worker.is_chief:
        run.saver.folder.update_run_json({"features": run.plan.features.input_kinds})
    return open_phase_inputs(run, name)


def score_validation(
    run: RunContext, scorer: Scorer, source: BatchSource, fraction: float = 1.0
) -> dict[str, float] | None:
    """Score the validation split. All workers must call this, and get the same scores.

    Args:
        scorer: scores the network that takes the inputs in `source`.
        source: the validation split as images or as cached features.
        fraction: fraction of the batches that are scored.

    Returns:
        The scores by name, such as "val_loss"; None on all workers if a stop was requested.
    """
    with run.clock.span("evaluation", "validation"):
        predictions = scorer.score(source, run.config.training.batch_size, "validation", fraction)
        if run.worker.should_stop("in validation"):
            return None
        arrays = predictions.probabilities, predictions.labels, predictions.losses
        return run.worker.control.broadcast("validation", lambda: compute_validation_scores(*arrays))


def require_plausible_losses(run: RunContext, current: PhaseRun, losses: dict[str, float]) -> None:
    """Raise `Diverged` if one of the mean losses (by name) is not finite, or too large for a classifier that learns."""
    state = run.state
    num_classes = len(run.images.dataset.class_names)
    settings = current.step.settings
    epoch = state.epoch + 1
    require_plausible(losses, settings, num_classes=num_classes, step=state.step, phase=current.name, epoch=epoch)


def collect_results(run: RunContext, exports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the content of report.json except for the scores. `exports`: as `export_classifier` returns them."""
    teacher = {}
    if run.config.distillation:
        teacher_path = locate_teacher(run.config.distillation.teacher, run.saver.address)
        teacher = {"teacher": read_scores(teacher_path, run.images.dataset.fingerprint)}
    start = {"starts": run.state.starts, "workers": run.worker.size, "command": run.saver.folder.read_last_command()}
    return {
        "title": run.config.experiment_name or run.images.dataset.name,
        "history": run.state.history,
        "phases": run.state.finished,
        "export": {name: entry | {"path": f"export/{entry['path']}"} for name, entry in exports.items()},
        **teacher,
        "trained_on": run.config.debug.overfit,
        "timing": run.clock.report(run.state.images) | start,
    }
