"""One run, from a configuration to a report and a model that serves. Read it top to bottom.

set up -> restore -> plan -> for each phase: thaw, inputs, epochs of steps and validation -> finish
"""

import json
import shutil
import time
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import numpy as np

from trainer.cluster.control import ControlChannel
from trainer.cluster.devices import build_strategy
from trainer.cluster.signals import StopFlag
from trainer.cluster.worker import Worker
from trainer.config.schema import Phase, RequestedConfig
from trainer.context import RunContext, RunPlan, failures_recorded
from trainer.data.host import usable_cpus
from trainer.data.images import ImageStore, data_errors
from trainer.data.open import open_run_data, require_validation
from trainer.data.order import Order
from trainer.data.pipeline import training_batches
from trainer.data.shard_gate import ShardGate
from trainer.data.sharding import ShardingPlan, check_resumable, plan_sharding
from trainer.distillation.teacher import open_teacher
from trainer.errors import INTERRUPTED, Interrupted, StopRequested
from trainer.evaluation.scoring import Scorer, validation_scores
from trainer.exporting.formats import check_formats
from trainer.features.inputs import Inputs, go_live, open_inputs
from trainer.features.plan import Division, FeaturePlan, choose_features, divide, train_images_read_once
from trainer.models.classifier import build_classifier
from trainer.models.freezing import ThawPlan, apply_thaw
from trainer.monitoring.health import FINISH, health
from trainer.monitoring.log import log
from trainer.runs.clock import Clock
from trainer.runs.folder import RunFolder, note_facts, resolve_auto_once, started_with
from trainer.runs.metrics import MetricsWriter, cut_back
from trainer.runs.restore import assign_values, take_weights
from trainer.runs.saver import Saver
from trainer.training import variables
from trainer.training.early_stopping import exhausted, judge
from trainer.training.optimizers import build_optimizer, build_schedule
from trainer.training.phase_weights import best_step, select_phase_weights, summarise_phase
from trainer.training.state import RunState
from trainer.training.step import StepSettings, TrainingStep, require_finite
from trainer.types import scored_split

AFTER = "after training had ended"


def train_run(
    config: RequestedConfig, folder: RunFolder, control: ControlChannel, stop: StopFlag, began: float
) -> None:
    """Train, evaluate, export and report, or go on where `folder` was left. All workers run this, in step.

    Args:
        began: time.time() at which the process started, for the account of where the time went.

    Raises:
        TrainerError: with a message for the user and the exit code of the process.
    """
    run, divisions = set_up(config, folder, control, stop, began)
    with failures_recorded(run):
        restored = restore(run, folder)
        run.plan = make_plan(run, divisions)
        names = list(run.config.phases)
        with run.clock.span("train"):
            while run.state.phase < len(names):
                if run.worker.should_stop("before a phase"):  # to compile it may take longer than the grace period
                    leave(run, "between phases")
                train_phase(run, names[run.state.phase], restored)
                restored = {}
        with run.clock.span("finish"):
            finish(run)


# ---------------------------------------------------------------------------------------------------------------
# Set up
# ---------------------------------------------------------------------------------------------------------------


def set_up(
    requested: RequestedConfig, folder: RunFolder, control: ControlChannel, stop: StopFlag, began: float
) -> tuple[RunContext, dict[str, Division]]:
    """Open data, devices and model, and divide the model for each phase; devices come before the first tensor."""
    log.info(f"run: {folder.address}{' (resuming)' if folder.resuming else ''}")
    check_formats(requested.export.formats, requested.model.backbone)
    health.set_activity("opening the data")
    data = open_run_data(requested, log.info, lambda address: stop.check(f"while {address} was fetched"))
    dataset = data.dataset
    require_validation(dataset)
    counts = ", ".join(f"{split.count:,} {name}" for name, split in dataset.splits.items())
    log.info(f"data: {dataset.name}, {len(dataset.class_names)} classes, {counts}")
    control.require_equal("data", {"fingerprint": dataset.fingerprint, "classes": list(dataset.class_names)}
                          | {f"{name} examples": split.count for name, split in dataset.splits.items()})  # fmt: skip

    config, reasons = resolve_auto_once(requested, folder, control, dataset)
    stop.check("before training began")
    health.set_activity("building the model")
    worker = Worker(control, build_strategy(config, control, log.info, usable_cpus()), stop)
    stop.install()  # again: TensorFlow's coordination service takes the handlers away
    with worker.strategy.scope():
        model = config.model.model_copy(update={"weights": data.weights})
        classifier = build_classifier(model, len(dataset.class_names), config.seed)
    divisions = divide(config, classifier)  # before anything is written: a mistake in the last phase costs no other
    log.info(f"model: {config.model.backbone} ({config.model.weights}) at {classifier.image_size} px")
    workers = {"workers": control.size, "found_by": control.cluster.source}
    facts = {"classes": list(dataset.class_names)} | ({"advice": reasons} if reasons else {})
    control.broadcast("run", lambda: folder.note_start(facts, dataset.fingerprint, workers))
    chief_folder = folder.path if control.is_chief else None
    run = RunContext(
        config=config,
        worker=worker,
        images=ImageStore(data, config, classifier.image_size, stop.check),
        classifier=classifier,
        state=RunState(),
        saver=Saver(folder, control, config.runtime.keep_checkpoints),
        clock=Clock(chief_folder and chief_folder / "ledger.json", began),
        metrics=MetricsWriter(chief_folder, config.runtime.progress, config.training.batch_size),
    )
    return run, divisions


# ---------------------------------------------------------------------------------------------------------------
# Restore, and plan what is left
# ---------------------------------------------------------------------------------------------------------------


def restore(run: RunContext, folder: RunFolder) -> dict[str, np.ndarray]:
    """Load order: this run's newest checkpoint > warm start > what the backbone was built with.

    Returns:
        the variables of this run's checkpoint by name, for the optimizer of the phase that goes on; else none.
    """
    control, config, classifier = run.worker.control, run.config, run.classifier
    state, restored = run.saver.newest(folder.resuming)
    if state:
        run.state = RunState.from_json(state)
        assign_values(classifier, classifier.variables, restored, f"checkpoint step {run.state.step}")
        log.info(f"weights: this run's checkpoint at step {run.state.step}")
    elif config.warm_start:
        where, count = take_weights(control, classifier, config.warm_start, config.runtime.cache_folder)
        log.info(f"weights: warm start from {where}, {count} of {len(classifier.variables)} variables")
    else:
        log.info(f"weights: backbone {config.model.weights}, head from the seed")
    step = run.state.step
    health.set_gauges(step=step, epoch=run.state.epoch + 1)
    if control.is_chief:
        health.checkpoint_saved()
        run.clock.resumed(run.state.train_seconds)
        cut_back(run.saver.path / "metrics.jsonl", run.saver.path / "logs", step)
    control.broadcast("attempt", lambda: run.saver.restarts.begin(step, config.runtime.max_restarts_without_progress))
    run.state.starts += 1
    return restored


def make_plan(run: RunContext, divisions: dict[str, Division]) -> RunPlan:
    """Decide what each phase reads and how the workers share the data, and open the teacher."""
    worker, config, state, images = run.worker, run.config, run.state, run.images
    control, split = worker.control, images.dataset.splits["train"]
    reads = choose_features(control, images, divisions, run.saver.path, begun=state.step > 0)
    features = FeaturePlan(divisions, reads)
    images.train_once = train_images_read_once(config, features.reads, state.phase)
    health.set_activity("opening the training images")
    # Every worker decodes at the same time, whatever the answer will be.
    kept = "features" if images.train_once else images.split("train").kept

    shared = plan_sharding(config.data.shard_by, split, worker.size, config.training.batch_size, kept, state.sharding)
    sharding = ShardingPlan(**control.broadcast("sharding", lambda: asdict(shared)))
    check_resumable(sharding, state.sharding, state.epoch_step)
    state.sharding = sharding.facts
    if worker.size > 1:
        log.info(sharding.describe(split, worker.index))
    run.scorer = Scorer(worker, run.classifier, sharding.of_worker(worker.index), run.clock.waited)
    run.metrics.expect(sum(config.phase_steps(phase, sharding.steps_per_epoch) for phase in config.phases.values()))

    teacher = None
    if config.distillation and state.phase < len(config.phases):
        health.set_activity("opening the teacher")
        teacher = open_teacher(worker, images, run.scorer.sharding, run.saver.address, state.teacher)
        state.teacher = teacher.fingerprint
    return RunPlan(features, sharding, teacher)


# ---------------------------------------------------------------------------------------------------------------
# One phase
# ---------------------------------------------------------------------------------------------------------------


@dataclass
class PhaseRun:
    """What the epochs of one phase share; batches are read from `stream`, whose shards `gate` waits for."""

    name: str
    phase: Phase
    total: int  # optimizer steps at most
    step: TrainingStep
    rate: Any  # learning rate as a function of the phase's step
    inputs: Inputs
    stream: Any
    gate: ShardGate
    saved: dict[str, Any]  # every variable that a checkpoint holds, by name


def train_phase(run: RunContext, name: str, restored: dict[str, np.ndarray]) -> None:
    """Thaw what the phase names, train it to its end, and choose the weights that the next one begins with."""
    phase, state, steps_per_epoch = run.config.phases[name], run.state, run.plan.sharding.steps_per_epoch
    total = run.config.phase_steps(phase, steps_per_epoch)
    health.enter_phase(name)
    thaw = apply_thaw(run.classifier, phase.thaw, phase.batch_norm, phase.backbone_rate, phase.layer_decay)
    log.info(f"phase {name}: {total} steps ({total / steps_per_epoch:.3g} epochs), {phase.optimizer.name} "
        f"{phase.optimizer.learning_rate:g} {phase.schedule.name}")  # fmt: skip
    for line in thaw.lines():
        log.info(f"  {line}")
    run.images.train_once = train_images_read_once(run.config, run.plan.features.reads, state.phase)

    def over() -> bool:
        return state.phase_step >= total or exhausted(state, phase.early_stopping)

    validated = state.epoch_step == 0  # not so where a signal came between the last step and its validation
    if not (validated and over()):
        with run.clock.span("compile"):
            part = open_phase(run, name, thaw, total)
            if restored:
                variables.write(part.step.checkpointed(), restored, f"checkpoint step {state.step}")
        while True:
            train_epoch(run, part)
            entry, best = validate(run, part)
            state.history.append(entry)
            state.epoch, state.epoch_step, state.sums = state.epoch + 1, 0, [0.0, 0.0, 0.0]
            if best or over() or due(run):
                save(run, part)
            if over() and state.phase_step < total:
                rule = phase.early_stopping
                log.info(f"phase {name}: no better {rule.metric} in {rule.patience} epochs, stopping early")
            if run.worker.should_stop("after an epoch"):
                save_and_leave(run, part)
            if over():
                break
        part.stream = None  # from here on nothing reads ahead
        part.gate.close()
    end_phase(run, name, thaw)


def open_phase(run: RunContext, name: str, thaw: ThawPlan, total: int) -> PhaseRun:
    """Open what the phase reads and put its step on the device."""
    config, state, worker, phase = run.config, run.state, run.worker, run.config.phases[name]
    inputs = inputs_of(run, name)
    teacher, batch_size, per_epoch = run.plan.teacher, config.training.batch_size, run.plan.sharding.steps_per_epoch
    rate = build_schedule(
        phase.schedule,
        phase.optimizer.learning_rate,
        total_steps=total,
        steps_per_epoch=per_epoch,
        batch_size=batch_size,
    )
    with worker.strategy.scope():
        optimizer = build_optimizer(phase.optimizer, rate, thaw.lr_multipliers)
    settings = StepSettings.from_config(config, run.images.dataset, thaw.batch_norm_training)
    network, stop = teacher.network if teacher else None, worker.stop_requested
    step = TrainingStep(
        worker.strategy, inputs.network, thaw.trainable, optimizer, settings, stop=stop, teacher=network
    )
    order = Order(
        batch_size=batch_size,
        seed=config.seed,
        window=config.data.shuffle_window,
        first_epoch=state.epoch,
        first_step=state.epoch_step,
        sharding=run.scorer.sharding,
    )
    batches = training_batches(
        inputs.training, order, replicas=worker.replicas, augmentation=inputs.augmentation, views=inputs.views
    )
    dataset = teacher.with_answers(batches.dataset) if teacher else batches.dataset
    stream = iter(worker.strategy.distribute_datasets_from_function(lambda _: dataset))
    saved = run.classifier.variables | step.checkpointed()
    return PhaseRun(name, phase, total, step, rate, inputs, stream, batches.gate(), saved)


def inputs_of(run: RunContext, name: str) -> Inputs:
    """Open what a phase reads, features or images; one that finds no room for its features goes on with images."""
    category = "compile" if run.plan.features.reads[name] == "live" else "features"
    with run.clock.span(category, "computing features" if category == "features" else "opening the training images"):
        inputs = open_inputs(name, run.worker, run.images, run.classifier, run.plan.features, run.scorer)
    if inputs is not None:
        return inputs
    if run.worker.should_stop(where := "while features were computed"):
        leave(run, where)
    if run.state.phase_step:
        raise Interrupted(
            f"phase {name} began with cached features, and there is no room for them: give it with "
            f"runtime.disk_budget_gb, runtime.memory_budget_gb or runtime.cache_dir. {run.saver.resume_hint}"
        )
    log.info(f"features of phase {name}: live after all, there is no room for them")
    go_live(name, run.images, run.plan.features)
    if run.worker.is_chief:
        note_facts(run.saver.path, {"features": run.plan.features.reads})
    return inputs_of(run, name)


def end_phase(run: RunContext, name: str, thaw: ThawPlan) -> None:
    """Give the next phase, or the export, the weights that `training.keep` names: averaged ones where EMA is on."""
    state, training = run.state, run.config.training
    step = select_phase_weights(state, run.config.phases[name].early_stopping, training.keep)
    step, weights = run.saver.read_weights(step, state.step, list(run.classifier.variables))
    variables.write(run.classifier.variables, weights, f"checkpoint step {step}")
    trainable = sum(int(np.prod(v.shape)) for v in thaw.trainable.values())
    summary, kept = summarise_phase(state, name, step)
    state.finished[name] = summary | {"trainable_parameters": trainable}
    epoch = f"epoch {kept['epoch']}{', averaged' if training.ema else ''}"
    if "kept_from" in summary:
        log.info(f"phase {name}: val_accuracy {summary['own_val_accuracy']:.4f} at best, it began with "
            f"{kept['val_accuracy']:.4f}: the weights of {kept['phase']} ({epoch}) go on")  # fmt: skip
    else:
        log.info(f"phase {name}: val_accuracy {kept['val_accuracy']:.4f}; the {training.keep} weights ({epoch}) go on")
    state.phase, state.phase_step, state.best, state.bad_epochs = state.phase + 1, 0, None, 0
    state.carried = step if training.keep == "best" else None


# ---------------------------------------------------------------------------------------------------------------
# One epoch
# ---------------------------------------------------------------------------------------------------------------


def train_epoch(run: RunContext, part: PhaseRun) -> None:
    """Take the steps of an epoch, several per device call; a call ends early, on all workers, if one was told to stop.

    Raises:
        DataError: an example cannot be read.
        Diverged: the loss is not finite.
        StopRequested: everything is saved.
    """
    state, runtime, batch_size = run.state, run.config.runtime, run.config.training.batch_size
    steps_per_epoch = run.plan.sharding.steps_per_epoch
    left = min(steps_per_epoch - state.epoch_step, part.total - state.phase_step)
    log_every = runtime.log_every.steps(steps_per_epoch, batch_size)
    window = run.config.debug.profile_steps
    began, waited = time.monotonic(), 0.0
    while left > 0:
        run.metrics.profile(state.step, window)
        traced = part.step.traced
        count = min(runtime.steps_per_call if traced else 1, left, log_every - state.step % log_every)
        activity = ("train", "training") if traced else ("compile", "compiling the first step")
        with run.clock.span(*activity), data_errors(part.inputs.training):
            try:
                late = part.gate.wait_for(count * batch_size // run.worker.size)
            except (
                StopRequested
            ):  # several workers end as they are: the others may be inside a step that needs this one
                if run.worker.size > 1:
                    raise
                save_and_leave(run, part)
            rows, idle, stopped = part.step.run(part.stream, count, state.step, state.phase_step)
            run.clock.waited(idle + late)
        waited += idle + late
        left -= len(rows)
        state.step, state.phase_step, state.epoch_step = (
            before + len(rows) for before in (state.step, state.phase_step, state.epoch_step)
        )
        health.steps_taken(state.step, state.epoch + 1)
        require_finite(rows, state.step, f"phase {part.name}, epoch {state.epoch + 1}", part.name)
        for row in rows.astype(np.float64):
            state.sums = [a + float(b) for a, b in zip(state.sums, row, strict=True)]
            state.interval = [a + float(b) for a, b in zip(state.interval, row, strict=True)]
        state.images += float(rows[:, 2].sum())
        if state.step % log_every == 0 or left == 0:
            loss, correct, seen = state.interval
            entry = {"phase": part.name, "epoch": state.epoch + 1, "step": state.step, "loss": loss / seen,
                     "accuracy": correct / seen, "learning_rate": float(part.rate(state.phase_step - 1))}  # fmt: skip
            run.metrics.interval(entry, seen, time.monotonic() - began, waited, run.clock.goodput)
            state.interval = [0.0, 0.0, 0.0]
            run.saver.publisher.check()
            if left and due(run) and not stopped:
                save(run, part)
            began, waited = time.monotonic(), 0.0
        if stopped:
            save_and_leave(run, part)
    run.metrics.profile(state.step, window)


def validate(run: RunContext, part: PhaseRun) -> tuple[dict[str, Any], bool]:
    """Score the validation split; returns the epoch's entry of the history, and whether it is the phase's best."""
    state, training, inputs, averages = run.state, run.config.training, part.inputs, part.step.averages
    began = time.monotonic()
    with run.clock.span("evaluation", "validation"):
        if averages:
            averages.swap()
        try:
            scored = inputs.scorer.score(
                inputs.validation, training.batch_size, "validation", training.validation_share
            )
        finally:
            if averages:
                averages.swap()
        if run.worker.should_stop("in validation"):
            save_and_leave(run, part)
        scores = run.worker.control.broadcast(
            "validation", lambda: validation_scores(scored.probabilities, scored.labels)
        )
    loss, correct, seen = state.sums
    entry = {"phase": part.name, "epoch": state.epoch + 1, "step": state.step, "loss": loss / seen,
             "accuracy": correct / seen, **scores, "learning_rate": float(part.rate(state.phase_step))}  # fmt: skip
    best = judge(state, entry, part.phase.early_stopping)
    spent = run.clock.seconds["train"] - sum(e["seconds"] for e in state.history)
    run.metrics.epoch(entry, {"seconds": spent, "validation_seconds": time.monotonic() - began}, best)
    return {**entry, "seconds": spent}, best


# ---------------------------------------------------------------------------------------------------------------
# Save and stop
# ---------------------------------------------------------------------------------------------------------------


def due(run: RunContext) -> bool:
    """Whether it is time for a checkpoint."""
    every = run.config.runtime.checkpoint_every.steps(run.plan.sharding.steps_per_epoch, run.config.training.batch_size)
    return run.state.step - run.saver.saved_step >= max(every, 1)


def save(run: RunContext, part: PhaseRun) -> None:
    """Commit a checkpoint of where the run stands now. The chief alone writes; the others need not wait for it."""
    state = run.state
    with run.clock.span("checkpoint", "saving a checkpoint"):
        state.train_seconds = run.clock.seconds["train"]
        run.metrics.flush()
        run.saver.save(state.to_json(), part.saved, best_step(state, part.phase.early_stopping))


def save_and_leave(run: RunContext, part: PhaseRun) -> NoReturn:
    """After a signal, on all workers: save, then end with the code that means "start me again"."""
    if run.saver.saved_step != run.state.step:
        save(run, part)
    run.saver.publisher.wait()
    run.worker.control.barrier("saved")
    leave(run, f"at step {run.state.step}")


def leave(run: RunContext, where: str) -> NoReturn:
    """All workers at the same point: each ends for itself, with everything saved."""
    run.worker.control.disconnect()
    reason = run.worker.stop.reason or "told to stop by another worker"
    raise StopRequested(f"{reason} {where}; everything is saved. {run.saver.resume_hint}")


# ---------------------------------------------------------------------------------------------------------------
# Finish
# ---------------------------------------------------------------------------------------------------------------


def finish(run: RunContext) -> None:
    """Score the test split, export, check the exports, report, and write DONE; after a kill it gives the same files.

    All workers score; the chief alone exports and writes, while the others wait for it.

    Raises:
        StopRequested: the next start begins here again.
        ModelError: an export lost too much accuracy; all else is written, but not DONE.
    """
    # SciPy and matplotlib: seconds that the first step need not wait for
    from trainer.exporting.export import export_classifier
    from trainer.exporting.formats import refuse
    from trainer.exporting.model_card import write_model_card
    from trainer.models.grad_cam import make_explainer
    from trainer.report.build import build_report, show_in_tensorboard
    from trainer.report.summary import summarise

    images, config, clock, saver = run.images, run.config, run.clock, run.saver
    control, stop, dataset = run.worker.control, run.worker.stop, run.images.dataset

    def check() -> None:
        health.progress()
        stop.check(AFTER)

    health.enter_phase(FINISH)
    images.train_once = train_images_read_once(config, run.plan.features.reads, run.state.phase)
    with clock.span("evaluation", "evaluation"):
        split = scored_split(dataset.splits)
        log.info(f"evaluating {dataset.splits[split].count:,} {split} examples")
        scored = run.scorer.score(images.split(split), config.training.batch_size, f"scores of {split}")
        if run.worker.should_stop("after scoring"):
            stop.request("stopped by another worker")
        check()
    if not control.is_chief:
        stop.on_request = lambda reason: control.end(INTERRUPTED, f"{reason} {AFTER}; nothing is lost")
        control.broadcast_bytes("done")
        return
    control.detach_workers()
    explain = make_explainer(run.classifier)
    with clock.span("finish", "export"):
        shutil.rmtree(saver.path / "export", ignore_errors=True)
        log.info("exporting")
        exports = export_classifier(saver.path / "export", run.classifier, images, scored, explain, check)
        exports = {name: facts | {"path": f"export/{facts['path']}"} for name, facts in exports.items()}
        check()
        clock.lap()
        log.info("writing the report")
        health.set_activity("report")
        facts = {
            "title": config.experiment_name or dataset.name,
            "history": run.state.history,
            "phases": run.state.finished,
            "export": exports,
            "timing": clock.report(run.state.images)
            | {"starts": run.state.starts, "workers": run.worker.size, "command": started_with(saver.path)},
        }
        report = build_report(saver.path / "report", scored, images, explain, facts, list(dataset.splits), check)
        show_in_tensorboard(saver.path / "report", saver.path / "logs" / "report", report, run.state.step)
        write_model_card(saver.path / "export" / "model_card.md", report, config.model_dump(mode="json"))
        check()
    clock.write()
    run.metrics.flush()
    health.set_activity("publishing")
    if any(facts["refused"] for facts in exports.values()):
        saver.publisher.results()
        summarise(report, saver.address)
        refuse(exports, config.export.max_accuracy_drop)
    saver.publisher.finish(json.dumps({"test_accuracy": report["test"]["accuracy"], "step": run.state.step}) + "\n")
    control.broadcast_bytes("done")
    summarise(report, saver.address)
