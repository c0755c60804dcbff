"""Before the first step: devices, data, model, and the weights it begins with."""

from __future__ import annotations

from pathlib import Path

from trainer.cluster.preemption import StopFlag
from trainer.cluster.strategy import build_strategy
from trainer.config import RunConfig
from trainer.contracts import Dataset
from trainer.data.order import steps_per_epoch
from trainer.data.sources import open_dataset
from trainer.errors import DataError
from trainer.models.classifier import build_classifier
from trainer.run import Run, say, steps_of
from trainer.training import variables
from trainer.training.checkpoints import CheckpointFolder
from trainer.training.run_folder import RunFolder
from trainer.training.state import RunState
from trainer.training.step import EvaluationPass
from trainer.training.telemetry import Telemetry, cut_back


def open_run(config: RunConfig, home: RunFolder) -> Run:
    """Open everything that a run needs; the order matters, devices come before the first tensor."""
    say(f"run: {home.path}{' (resuming)' if home.resuming else ''}")
    strategy = build_strategy(config.runtime, say)
    stop = StopFlag()
    cache = Path(config.runtime.cache_dir).expanduser()
    limit = config.training.batch_size if config.debug.overfit else config.debug.max_examples
    dataset = open_dataset(config.data, seed=config.seed, cache_dir=cache, max_examples=limit, note=say)
    if config.debug.overfit:
        only = dataset.splits["train"]
        dataset = Dataset(dataset.name, dataset.class_names, {"train": only, "validation": only}, dataset.fingerprint)
    if "validation" not in dataset.splits:
        raise DataError("there is nothing to validate on: set data.validation_fraction or data.validation_split")
    counts = ", ".join(f"{split.count:,} {name}" for name, split in dataset.splits.items())
    say(f"data: {dataset.name}, {len(dataset.class_names)} classes, {counts}")

    with strategy.scope():
        classifier = build_classifier(config.model, len(dataset.class_names), config.seed)
    say(f"model: {config.model.backbone} ({config.model.weights}) at {classifier.image_size} px")
    home.note_start({"classes": list(dataset.class_names)}, dataset.fingerprint)

    epoch_steps = steps_per_epoch(dataset.splits["train"].count, config.training.batch_size)
    total = sum(steps_of(phase, config, epoch_steps) for phase in config.phases.values())
    return Run(
        config=config,
        folder=home.path,
        strategy=strategy,
        dataset=dataset,
        classifier=classifier,
        evaluator=EvaluationPass(strategy, classifier),
        checkpoints=CheckpointFolder(home.path / "checkpoints", config.runtime.keep_checkpoints, say),
        telemetry=Telemetry(home.path, config.runtime.progress, total, config.training.batch_size),
        stop=stop,
        state=RunState(),
        steps_per_epoch=epoch_steps,
    )


def resume(job: Run, home: RunFolder) -> None:
    """Load order: this run's newest checkpoint > warm start > what the backbone was built with."""
    found = job.checkpoints.newest() if home.resuming else None
    if found:
        state, job.loaded = found
        job.state = RunState.from_json(state)
        job.saved_step = job.state.step
        variables.write(job.classifier.variables, job.loaded, f"checkpoint step {job.state.step}")
        say(f"weights: this run's checkpoint at step {job.state.step}")
    elif job.config.warm_start:
        take_weights(job, job.config.warm_start)
    else:
        say(f"weights: backbone {job.config.model.weights}, head from the seed")
    cut_back(job.folder / "metrics.jsonl", job.folder / "logs", job.state.step)


def take_weights(job: Run, source: str) -> None:
    """Warm start: every variable of the same name and shape from another run's best (or newest) checkpoint, averaged
    where that run had EMA on.
    """
    folder = Path(source).expanduser()
    home = folder if (folder / "checkpoints").is_dir() else folder.parent.parent
    there = CheckpointFolder(home / "checkpoints", 1, say)
    pointer = there.folder / "BEST"
    name = folder.name if home != folder else pointer.read_text().strip() if pointer.exists() else ""
    steps = [step for step in there.steps() if there.path(step).name == name] or there.steps()[-1:]
    if not steps:
        raise DataError(f"warm_start={source}: there is no checkpoint; give the output_dir of a run")
    _, values = there.read(steps[0])
    values |= {name.removeprefix("ema/"): value for name, value in values.items() if name.startswith("ema/")}
    own = job.classifier.variables
    fit = {n: v for n, v in own.items() if n in values and tuple(values[n].shape) == tuple(v.shape)}
    if not fit:
        raise DataError(f"warm_start={source}: none of its variables fits this model; is it of another backbone?")
    variables.write(fit, values, source)
    say(f"weights: warm start from {there.path(steps[0])}, {len(fit)} of {len(own)} variables")
