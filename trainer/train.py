"""Train a run on this worker, from the configuration to the report and the exported models. Read it top to bottom.

set up -> restore -> plan -> per phase: freeze, open inputs, train and validate epochs -> test, export, report
"""

import json
import shutil
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any, NoReturn

import numpy as np

from trainer.cluster.control import ControlChannel
from trainer.cluster.devices import build_strategy, choose_devices, detect_device
from trainer.cluster.signals import StopFlag
from trainer.cluster.worker import Worker
from trainer.config.auto import limit_batch_size
from trainer.config.schema import RequestedConfig, RunConfig
from trainer.context import (
    PhaseRun,
    RunContext,
    RunPlan,
    abandon_on_error,
    advise_export,
    broadcast_sharding,
    collect_results,
    is_checkpoint_due,
    open_phase,
    raise_stopped,
    record_failures,
    require_plausible_losses,
    resume_sharding,
    score_validation,
    show_phase,
)
from trainer.data.host import count_usable_cpus
from trainer.data.images import ImageStore, convert_data_errors
from trainer.data.open import require_validation, stage_and_open_run_dataset
from trainer.data.remote import show_addresses_in_errors
from trainer.data.sharding import ShardingPlan
from trainer.distillation.teacher import ConfiguredTeacher, load_teacher, open_teacher
from trainer.errors import INTERRUPTED, DataError, StopRequested
from trainer.evaluation.scoring import Scorer, get_images_per_call
from trainer.exporting.formats import check_formats
from trainer.features.plan import Division, FeaturePlan, choose_features, divide_phases, reads_images_only_once
from trainer.models.classifier import build_classifier, count_parameters
from trainer.models.freezing import FreezingPlan, set_trainable_layers
from trainer.models.weights_folder import locate_weights
from trainer.monitoring.health import FINISH, health
from trainer.monitoring.log import log
from trainer.monitoring.progress import log_while_slow
from trainer.planning.computation import adopt_computations, plan_computations
from trainer.planning.estimates import measure_resident_bytes
from trainer.planning.warnings import find_run_warnings
from trainer.runs.clock import BREAKDOWN_FILE, Clock
from trainer.runs.folder import RunFolder, resolve_auto_once
from trainer.runs.metrics import MetricsWriter, count_steps_to_profile, truncate_metrics
from trainer.runs.restore import assign_values, load_warm_start
from trainer.runs.saver import Saver
from trainer.runs.stored_run import disable_pretrained_weights
from trainer.training import early_stopping, variables
from trainer.training.losses import compute_class_weights
from trainer.training.state import RunState
from trainer.training.step import require_finite
from trainer.types import choose_scored_split

AFTER_TRAINING = "after the end of training"  # completes a message such as "SIGTERM after the end of training"


def train_run(
    config: RequestedConfig, folder: RunFolder, control: ControlChannel, stop: StopFlag, process_started: float
) -> None:
    """Train, evaluate, export and report. Resume the run if `folder` has a checkpoint. All workers must call this.

    `process_started`: time.time() at the start of the process, for the time breakdown.

    Raises:
        TrainerError: the run has failed or was stopped. The process should exit with the error's `exit_code`.
    """
    with abandon_on_error(folder, control):
        run, divisions, advice, baseline = set_up(config, folder, control, stop, process_started)
    with record_failures(run, folder), show_addresses_in_errors(run.images.addresses):
        restored, sharding = restore(run)
        features, compiled, teacher = choose_inputs(run, folder, divisions, baseline)
        record_start(run, folder, features.to_json() | {"xla": compiled}, advice)
        run.plan = make_plan(run, features, compiled, teacher, sharding)
        with run.clock.span("train"):
            while run.state.phase < len(run.config.phases):
                if run.worker.should_stop("before a phase"):  # as compiling can take longer than the grace period
                    raise_stopped(run, "between phases")
                train_phase(run, list(run.config.phases)[run.state.phase], restored)
                restored = {}  # later phases start from the phase weights, which the model already has
        with run.clock.span("finish"):
            finish(run)


# ---------------------------------------------------------------------------------------------------------------
# Set up


def set_up(
    requested: RequestedConfig, folder: RunFolder, control: ControlChannel, stop: StopFlag, process_started: float
) -> tuple[RunContext, dict[str, Division], list[str], int]:
    """Open the dataset, configure the devices, build the model, and divide its layers into trunk and tail per phase.

    Returns:
        The run; phase name -> division; a line with the reason for each resolved `auto` value; and the process's
        resident memory before the model was built, in bytes.
    """
    log.info(f"run: {folder.address}{' (resuming)' if folder.resuming else ''}")
    check_formats(requested.export.formats, requested.model.backbone)
    health.set_activity("opening the data")
    saver = Saver(folder, control, requested.runtime.keep_checkpoints)
    has_checkpoint = saver.broadcast_newest(folder.resuming)  # the checkpoint replaces the initial weights
    model = disable_pretrained_weights(requested.model) if has_checkpoint else locate_weights(requested.model)
    data_config = requested.model_copy(update={"model": model})
    data = stage_and_open_run_dataset(data_config, log.info, lambda address: stop.check(f"while fetching {address}"))
    dataset = data.dataset
    require_validation(dataset, requested.data.validation_fraction)
    split_counts = ", ".join(f"{split.count:,} {name}" for name, split in dataset.splits.items())
    log.info(f"data: {dataset.name}, {len(dataset.class_names)} classes, {split_counts}")
    counts = {f"{name} examples": split.count for name, split in dataset.splits.items()}
    control.require_equal("data", {"fingerprint": dataset.fingerprint, "classes": [*dataset.class_names]} | counts)
    if control.is_chief:
        folder.check_data(dataset)
    # The order matters: `auto` values depend on the devices, which are configured before the first tensor is created.
    replicas = choose_devices(requested.runtime, control.size)[1]
    config, reasons = resolve_auto_once(requested, folder, control, dataset, detect_device(), replicas * control.size)
    folder.config = config  # config.yaml records the batch size before it is limited
    compute_class_weights(config.training.class_weights, dataset.class_names, dataset.splits["train"].labels)  # check
    config, limit_reason = limit_batch_size(config, dataset.splits["train"].count, replicas * control.size)
    stop.check("before training")
    health.set_activity("building the model")
    worker = Worker(control, build_strategy(config, control, log.info, count_usable_cpus()), stop)
    stop.install()  # again: TensorFlow's coordination service replaces the signal handlers
    baseline_bytes = measure_resident_bytes()
    with worker.strategy.scope(), show_addresses_in_errors(data.addresses):
        model = config.model.model_copy(update={"weights": data.weights})
        classifier = build_classifier(model, len(dataset.class_names), config.seed)
    divisions = divide_phases(config, classifier)  # for all phases, so that an error in the last one ends the run now
    log.info(f"model: {config.model.backbone} ({config.model.weights}) at {classifier.image_size} px")
    if limit_reason and control.is_chief:
        log.warning(f"warning: {limit_reason}")
    chief_folder = folder.path if control.is_chief else None
    run = RunContext(
        config=config,
        worker=worker,
        images=ImageStore(data, config, classifier.image_size, stop.check),
        classifier=classifier,
        state=RunState(),
        saver=saver,
        clock=Clock(chief_folder and chief_folder / BREAKDOWN_FILE, process_started),
        metrics=MetricsWriter(chief_folder, config.runtime.progress, config.training.batch_size),
    )
    return run, divisions, reasons, baseline_bytes


# ---------------------------------------------------------------------------------------------------------------
# Restore and plan


def restore(run: RunContext) -> tuple[dict[str, np.ndarray], ShardingPlan | None]:
    """Load the weights of the run's newest checkpoint, or of `warm_start` if there is none. No file is written.

    Returns the checkpoint's variables by name, including the optimizer's, and the sharding to resume with; {} and None
    if there is no checkpoint. Raises a ConfigError if the number of workers prevents resuming.
    """
    control, config, classifier = run.worker.control, run.config, run.classifier
    sharding: ShardingPlan | None = None
    state, restored = run.saver.take_newest()
    if state:
        run.state = RunState.from_json(state)
        sharding = resume_sharding(run)
        assign_values(classifier, classifier.variables, restored, f"checkpoint step {run.state.step}")
        log.info(f"weights: this run's checkpoint at step {run.state.step}")
    elif config.warm_start:
        source, num_loaded = load_warm_start(control, classifier, config.warm_start, config.runtime.cache_folder)
        log.info(f"weights: warm start from {source}, {num_loaded} of {len(classifier.variables)} variables")
    else:
        log.info(f"weights: backbone {config.model.weights}, head random")
    health.set_gauges(step=run.state.step, epoch=run.state.epoch + 1)
    return restored, sharding


def choose_inputs(
    run: RunContext, folder: RunFolder, divisions: dict[str, Division], baseline: int
) -> tuple[FeaturePlan, dict[str, bool], ConfiguredTeacher | None]:
    """Choose each phase's input and whether XLA compiles its step (by phase name), load the teacher, and log warnings.

    `baseline`: resident memory before the model was built, bytes. Raises a ConfigError if the memory is too small.
    """
    recorded, control, device = folder.run_json if folder.resuming else {}, run.worker.control, detect_device()
    settings = run.config, device, run.worker.replicas * run.worker.size, run.classifier, run.images.dataset
    compiled = adopt_computations(control, run.config, device, plan_computations(*settings, divisions), recorded)
    features = choose_features(control, run.images, divisions, device, compiled, recorded)
    run.images.train_images_read_once = reads_images_only_once(run.config, features.input_kinds, run.state.phase)
    health.set_activity("opening the teacher")
    has_teacher = run.config.distillation and run.state.phase < len(run.config.phases)
    teacher = load_teacher(run.worker, run.images, run.saver.address, run.state.teacher) if has_teacher else None
    for warning in find_run_warnings(run.images, run.classifier, teacher, run.worker, baseline):
        log.warning(f"warning: {warning}")
    return features, compiled, teacher


def record_start(run: RunContext, folder: RunFolder, by_phase: dict[str, dict[str, Any]], advice: list[str]) -> None:
    """Record the start in the folder, and discard metrics and checkpoints that are newer than the restored checkpoint.

    Before this call, a start changes nothing in the folder. `by_phase`: field of run.json -> phase name -> value.

    Raises:
        GaveUp: too many restarts without progress.
    """
    control, step, max_restarts = run.worker.control, run.state.step, run.config.runtime.max_restarts_without_progress
    dataset = run.images.dataset
    fields = {"classes": list(dataset.class_names), "workers": control.size, "found_by": control.cluster.source,
              "device": asdict(detect_device())}  # fmt: skip

    def write() -> None:
        requested = folder.config
        assert isinstance(requested, RunConfig), "every `auto` is resolved"
        run.saver.restarts.require_progress(step, max_restarts)
        folder.record_start(requested, dataset, by_phase, fields | ({"advice": advice} if advice else {}))
        run.saver.restarts.add_start(step, max_restarts)
        run.saver.checkpoints.mark_corrupt_after(step)
        if step:
            rule = list(run.config.phases.values())[: run.state.phase + 1][-1].early_stopping  # the last one at the end
            run.saver.checkpoints.write_pointers(step, early_stopping.find_best_step(run.state, rule))
        health.record_checkpoint()
        run.clock.move_lost_time(run.state.train_seconds)
        epoch_step = run.state.history[-1]["step"] if run.state.history else 0
        truncate_metrics(run.saver.path / "metrics.jsonl", run.saver.path / "logs", step, epoch_step)

    control.broadcast("begin", write)
    run.state.starts += 1


def make_plan(
    run: RunContext, features: FeaturePlan, compiled: dict[str, bool], configured: ConfiguredTeacher | None,
    sharding: ShardingPlan | None,
) -> RunPlan:  # fmt: skip
    """Plan the sharding unless `sharding` is set, create the scorer, and open the teacher if one is `configured`."""
    worker, config, state, images = run.worker, run.config, run.state, run.images
    health.set_activity("opening the training images")
    cache = "features" if images.train_images_read_once else images.open_split("train").cached_in
    sharding = sharding or broadcast_sharding(run, cache)
    state.sharding = sharding.checkpoint_state
    if worker.size > 1:
        log.info(sharding.describe(images.dataset.splits["train"], worker.index))
    shard = sharding.for_scoring(worker.index)
    rows = get_images_per_call() if config.training.virtual_replicas else None
    run.scorer = Scorer(worker, run.classifier, shard, on_wait=run.clock.add_wait, rows_per_call=rows)
    steps_per_epoch = sharding.steps_per_epoch
    run.metrics.start(sum(config.count_phase_steps(phase, steps_per_epoch) for phase in config.phases.values()))
    teacher = None
    if configured:
        teacher = open_teacher(worker, images, run.scorer.sharding, configured)
        state.teacher = teacher.fingerprint
    return RunPlan(features, compiled, sharding, teacher)


# ---------------------------------------------------------------------------------------------------------------
# One phase


def train_phase(run: RunContext, name: str, restored: dict[str, np.ndarray]) -> None:
    """Train a phase to its last step or early stopping, then load its weights. `restored`: a checkpoint's variables."""
    phase, state, steps_per_epoch = run.config.phases[name], run.state, run.plan.sharding.steps_per_epoch
    total = run.config.count_phase_steps(phase, steps_per_epoch)
    health.enter_phase(name)
    show_phase(run, name, total)
    thaw = set_trainable_layers(run.classifier, phase.thaw, phase.batch_norm, phase.backbone_rate, phase.layer_decay)
    log.info(f"phase {name}: {total} steps ({total / steps_per_epoch:.3g} epochs), {phase.optimizer.name} "
        f"{phase.optimizer.learning_rate:g} {phase.schedule.name}")  # fmt: skip
    for line in thaw.format_lines():
        log.info(f"  {line}")
    run.images.train_images_read_once = reads_images_only_once(run.config, run.plan.features.input_kinds, state.phase)

    def finished() -> bool:
        return state.phase_step >= total or early_stopping.is_out_of_patience(state, phase.early_stopping)

    epoch_is_complete = state.epoch_step == 0  # False if the last start stopped before the epoch's validation
    if not (epoch_is_complete and finished()):
        with run.clock.span("compile"):
            current = open_phase(run, name, thaw, total)
            if restored:
                variables.assign_values(current.step.checkpoint_variables(), restored, f"checkpoint step {state.step}")
        while True:
            train_epoch(run, current)
            entry, is_best = validate(run, current)
            state.history.append(entry)
            state.epoch, state.epoch_step, state.sums = state.epoch + 1, 0, [0.0, 0.0, 0.0]
            if is_best or finished() or is_checkpoint_due(run):
                save(run, current)
            if finished() and state.phase_step < total:
                rule = phase.early_stopping
                log.info(f"phase {name}: early stopping, no better {rule.metric} in {rule.patience} epochs")
            if run.worker.should_stop("after an epoch"):
                save_and_stop(run, current)
            if finished():
                break
        current.batches = None  # deletes the pipeline, which ends its prefetching
        current.gate.close()
    end_phase(run, name, thaw)


def end_phase(run: RunContext, name: str, thaw: FreezingPlan) -> None:
    """Load the phase weights (best or last, by `training.keep`), and advance the state to the next phase.

    If `training.validation_share` is below 1, score them on the whole validation split first.
    """
    state, training = run.state, run.config.training
    best_step = early_stopping.find_best_step(state, run.config.phases[name].early_stopping)
    assert best_step is not None, "a phase ends after a validation"
    selected_step = best_step if training.keep == "best" else state.step
    step, weights = run.saver.broadcast_weights(selected_step, state.step, list(run.classifier.variables))
    variables.assign_values(run.classifier.variables, weights, f"checkpoint step {step}")
    full_scores: dict[str, float] | None = {}
    if training.validation_share < 1:
        log.info(f"phase {name}: scoring the {training.keep} weights on the whole validation split")
        full_scores = score_validation(run, run.scorer, run.images.open_split("validation"))
    if full_scores is None:
        raise_stopped(run, f"at the end of phase {name}")
    summary, entry = early_stopping.summarize_phase(state, name, step, full_scores)
    state.finished[name] = summary | {"trainable_parameters": count_parameters(thaw.trainable.values())}
    epoch = f"epoch {entry['epoch']}{', averaged' if training.ema else ''}"
    for line in early_stopping.describe_phase_end(name, summary, entry, f"the {training.keep} weights", epoch):
        log.info(line)
    state.phase, state.phase_step, state.best, state.bad_epochs = state.phase + 1, 0, None, 0
    state.carried = step if training.keep == "best" else None


# ---------------------------------------------------------------------------------------------------------------
# One epoch


def train_epoch(run: RunContext, current: PhaseRun) -> None:
    """Run the remaining steps of an epoch: log at each interval, and save a checkpoint when one is due.

    Raises:
        DataError: an example cannot be read.
        Diverged: the loss is not finite, or too large for a classifier that learns.
        StopRequested: a stop was requested. A checkpoint is saved, except if one of several workers waits for shards.
    """
    state, runtime, batch_size = run.state, run.config.runtime, run.config.training.batch_size
    steps_per_epoch = run.plan.sharding.steps_per_epoch
    steps_left = min(steps_per_epoch - state.epoch_step, current.total_steps - state.phase_step)
    log_every = runtime.log_every.steps(steps_per_epoch, batch_size)
    profile_steps = run.config.debug.profile_steps
    start, wait_seconds = time.monotonic(), 0.0
    while steps_left > 0:
        run.metrics.profile(state.step, profile_steps)
        traced = current.step.traced
        num_steps = min(runtime.steps_per_call if traced else 1, steps_left, log_every - state.step % log_every,
            count_steps_to_profile(state.step, profile_steps))  # fmt: skip
        activity = ("train", "training") if traced else ("compile", "compiling the first step")
        slow_log = nullcontext() if traced else log_while_slow(f"{activity[1]} of phase {current.name}")
        with run.clock.span(*activity), slow_log, convert_data_errors(current.inputs.training):
            try:
                shard_wait = current.gate.wait_for(num_steps * batch_size // run.worker.size)
            except StopRequested:
                if run.worker.size > 1:  # no checkpoint, because peers may be in a step that waits for this worker
                    raise
                save_and_stop(run, current)
            sums, batch_wait, stopped = current.step.run(current.batches, num_steps, state.step, state.phase_step)
            run.clock.add_wait(batch_wait + shard_wait)
        # A stop request can end the call after fewer than `num_steps` steps.
        wait_seconds += batch_wait + shard_wait
        steps_run = len(sums)
        steps_left -= steps_run
        state.step += steps_run
        state.phase_step += steps_run
        state.epoch_step += steps_run
        health.record_steps(state.step, state.epoch + 1)
        if not traced:
            show_phase(run, current.name, current.total_steps)
        require_finite(sums, state.step, current.name, state.epoch + 1)
        for step_sums in sums.astype(np.float64):
            state.sums = [a + float(b) for a, b in zip(state.sums, step_sums, strict=True)]
            state.interval = [a + float(b) for a, b in zip(state.interval, step_sums, strict=True)]
        state.images += float(sums[:, 2].sum())
        if state.step % log_every == 0 or steps_left == 0:
            loss_sum, num_correct, count = state.interval
            learning_rate = float(current.schedule(state.phase_step - 1))
            if count:  # 0 if all images of these steps were skipped as unreadable
                entry = {"phase": current.name, "epoch": state.epoch + 1, "step": state.step, "loss": loss_sum / count,
                         "accuracy": num_correct / count, "learning_rate": learning_rate}  # fmt: skip
                goodput, mean_rate = run.clock.goodput, run.clock.images_per_second(state.images)
                run.metrics.write_interval(entry, count, time.monotonic() - start, wait_seconds, goodput, mean_rate)
                require_plausible_losses(run, current, {"loss": loss_sum / count})
            state.interval = [0.0, 0.0, 0.0]
            run.saver.publisher.check()
            if steps_left and is_checkpoint_due(run) and not stopped:
                save(run, current)
            start, wait_seconds = time.monotonic(), 0.0
        if stopped:
            save_and_stop(run, current)
    run.metrics.profile(state.step, profile_steps)


def validate(run: RunContext, current: PhaseRun) -> tuple[dict[str, Any], bool]:
    """Score the validation split, with the averaged weights if `training.ema` is set.

    Returns the epoch's entry in `RunState.history`, and whether the epoch is the best one of the phase so far.
    """
    state, inputs = run.state, current.inputs
    start, (loss_sum, num_correct, num_examples) = time.monotonic(), state.sums
    run.images.gather_unreadable(run.worker.control)  # each worker knows only those in its own shard
    run.images.require_readable()
    if not num_examples:  # possible if the phase ends a few steps after the epoch begins
        problem = f"no image of epoch {state.epoch + 1} (phase {current.name}, {state.epoch_step} steps) could be read"
        raise DataError(problem, fix=f"repair the images, or make phases.{current.name} longer")
    with current.step.averaged_weights():
        scores = score_validation(run, inputs.scorer, inputs.validation, run.config.training.validation_share)
    if scores is None:
        save_and_stop(run, current)
    learning_rate = float(current.schedule(state.phase_step))
    entry = {"phase": current.name, "epoch": state.epoch + 1, "step": state.step, "loss": loss_sum / num_examples,
             "accuracy": num_correct / num_examples, **scores, "learning_rate": learning_rate}  # fmt: skip
    require_plausible_losses(run, current, {"val_loss": scores["val_loss"]})
    is_best = early_stopping.update_best(state, entry, current.phase.early_stopping)
    seconds = run.clock.seconds["train"] - sum(e["seconds"] for e in state.history)
    run.metrics.write_epoch(entry, {"seconds": seconds, "validation_seconds": time.monotonic() - start}, is_best)
    return {**entry, "seconds": seconds}, is_best


# ---------------------------------------------------------------------------------------------------------------
# Save and stop


def save(run: RunContext, current: PhaseRun) -> None:
    """Save a checkpoint of the current state. Only the chief writes; the other workers return immediately."""
    state = run.state
    with run.clock.span("checkpoint", "saving a checkpoint"):
        state.train_seconds = run.clock.seconds["train"]
        run.metrics.flush()
        best_step = early_stopping.find_best_step(state, current.phase.early_stopping)
        run.saver.save(state.to_json(), current.checkpoint_variables, best_step)


def save_and_stop(run: RunContext, current: PhaseRun) -> NoReturn:
    """Save a checkpoint unless this step has one, wait for its publication, and raise StopRequested on all workers."""
    if run.saver.saved_step != run.state.step:
        save(run, current)
    run.saver.publisher.wait()
    run.worker.control.barrier("saved")
    raise_stopped(run, f"at step {run.state.step}")


# ---------------------------------------------------------------------------------------------------------------
# Finish


def finish(run: RunContext) -> None:
    """Score the test (or else validation) split, export and verify the model, write the report, and write DONE.

    All workers score the split. Then the chief exports and writes, and the others wait. A restart repeats all steps.

    Raises:
        DataError: an example cannot be read.
        ModelError: an export lost too much accuracy. All results are written, but not DONE.
        StopRequested: a stop was requested. The next start repeats this function.
    """
    # Imported here, because SciPy and matplotlib would delay the first training step by seconds.
    from trainer.exporting.export import choose_parity_examples, export_classifier
    from trainer.exporting.formats import raise_if_refused
    from trainer.exporting.model_card import write_model_card
    from trainer.models.grad_cam import make_explainer
    from trainer.report.build import build_report, write_tensorboard_images
    from trainer.report.summary import log_summary

    images, config, clock, saver = run.images, run.config, run.clock, run.saver
    control, stop, dataset = run.worker.control, run.worker.stop, run.images.dataset
    check = partial(stop.check, AFTER_TRAINING)
    health.enter_phase(FINISH)
    images.train_images_read_once = reads_images_only_once(config, run.plan.features.input_kinds, run.state.phase)
    with clock.span("evaluation", "evaluation"), advise_export(saver.address):
        split = dataset.splits[choose_scored_split(dataset.splits)]
        log.info(f"evaluating {split.count:,} {split.name} examples")
        source, embedded = images.open_split(split.name), choose_parity_examples(split.count)
        scorer = run.scorer.with_embeddings(run.classifier)
        predictions = scorer.score(source, config.training.batch_size, "final", embedded=embedded)
        if run.worker.should_stop("after scoring"):
            stop.request("stopped by another worker")
        check()
    images.gather_unreadable(control)
    for line in images.describe_readable_counts():
        log.info(line)
    if not control.is_chief:
        stop.on_request = lambda reason: control.end(INTERRUPTED, f"{reason} {AFTER_TRAINING}; nothing is lost")
        control.broadcast_bytes("done")
        return
    control.ignore_peer_failures()
    explain = make_explainer(run.classifier)
    with clock.span("finish", "export"):
        shutil.rmtree(saver.path / "export", ignore_errors=True)
        log.info("exporting")
        exports = export_classifier(saver.path / "export", run.classifier, images, predictions, explain, check=check)
        clock.update()
        log.info("writing the report")
        health.set_activity("report")
        results, splits = collect_results(run, exports), list(dataset.splits)
        report = build_report(saver.path / "report", predictions, images, explain, results, splits=splits, check=check)
        write_tensorboard_images(saver.path / "report", saver.path / "logs" / "report", report, run.state.step)
        write_model_card(saver.path / "export" / "model_card.md", report, config.model_dump(mode="json"))
        check()
    clock.write()
    run.metrics.flush()
    health.set_activity("publishing")
    if any(entry["refused"] for entry in exports.values()):
        saver.publisher.publish_results()
        run.metrics.stop_display()
        log_summary(report, saver.address)
        raise_if_refused(exports, config.export.max_accuracy_drop)
    saver.publisher.finish(json.dumps({"test_accuracy": report["test"]["accuracy"], "step": run.state.step}) + "\n")
    control.broadcast_bytes("done")
    run.metrics.stop_display()
    log_summary(report, saver.address)
