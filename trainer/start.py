"""Before the first step: devices, data, model, and the weights it begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trainer.cluster.control import Peers
from trainer.cluster.devices import build_strategy
from trainer.cluster.signals import StopFlag
from trainer.config.auto import adopted, advise, choice_of, settled
from trainer.config.schema import RunConfig
from trainer.data.host import usable_cpus
from trainer.data.open import open_dataset
from trainer.data.order import Share, shards_of_workers, sizes_of_shards, steps_per_epoch
from trainer.data.remote import copies_ahead
from trainer.errors import ConfigError, DataError
from trainer.evaluation.scoring import EvaluationPass
from trainer.exporting.formats import check_formats
from trainer.features.plan import divisions
from trainer.models.classifier import build_classifier
from trainer.models.weights import settle_input
from trainer.monitoring.health import signs
from trainer.run import Run, from_chief, say, steps_of
from trainer.runs.checkpoints import CheckpointFolder, weights_of
from trainer.runs.clock import Ledger
from trainer.runs.folder import RunFolder
from trainer.runs.metrics import Telemetry, cut_back
from trainer.runs.publisher import Publisher
from trainer.runs.restarts import Attempts
from trainer.storage.path import place
from trainer.storage.staging import is_remote
from trainer.training import variables
from trainer.training.state import RunState
from trainer.types import Dataset, Split


def open_run(config: RunConfig, home: RunFolder, peers: Peers, stop: StopFlag, began: float) -> Run:
    """Open everything that a run needs; the order matters, devices come before the first tensor."""
    say(f"run: {home.address}{' (resuming)' if home.resuming else ''}")
    check_formats(config.export.formats, config.model.backbone)
    signs.at("opening the data")
    cache = Path(config.runtime.cache_dir).expanduser()
    local, where, shards = copies_ahead(config, cache, say, lambda address: stop.check(f"while {address} was fetched"))
    limit = config.training.batch_size if config.debug.overfit else config.debug.max_examples
    dataset = open_dataset(
        local.data, seed=config.seed, cache_dir=cache, max_examples=limit, note=say, arriving=shards is not None
    )
    if config.debug.overfit:
        only = dataset.splits["train"]
        dataset = Dataset(dataset.name, dataset.class_names, {"train": only, "validation": only}, dataset.fingerprint)
    if "validation" not in dataset.splits:
        raise DataError("there is nothing to validate on: set data.validation_fraction or data.validation_split")
    counts = ", ".join(f"{split.count:,} {name}" for name, split in dataset.splits.items())
    say(f"data: {dataset.name}, {len(dataset.class_names)} classes, {counts}")
    peers.agree("data", {"fingerprint": dataset.fingerprint, "classes": list(dataset.class_names)}
                | {f"{name} examples": split.count for name, split in dataset.splits.items()})  # fmt: skip

    config, reasons = settle(config, home, peers, dataset)
    stop.check("before training began")
    signs.at("building the model")
    strategy = build_strategy(config, peers, say, usable_cpus())
    stop.install()
    with strategy.scope():
        described = config.model.model_copy(update={"weights": local.model.weights})
        classifier = build_classifier(described, len(dataset.class_names), config.seed)
    parts = divisions(config, classifier)  # before the first step: a mistake in the last phase must not cost the others
    say(f"model: {config.model.backbone} ({config.model.weights}) at {classifier.image_size} px")
    workers = {"workers": peers.size, "found_by": peers.cluster.source}
    facts = {"classes": list(dataset.class_names)} | ({"advice": reasons} if reasons else {})
    peers.told("run", lambda: home.note_start(facts, dataset.fingerprint, workers))
    return Run(
        config=config,
        folder=home.path,
        address=home.address,
        publisher=home.publisher,
        peers=peers,
        strategy=strategy,
        dataset=dataset,
        classifier=classifier,
        evaluator=EvaluationPass(strategy, classifier),
        checkpoints=CheckpointFolder(home.path / "checkpoints", config.runtime.keep_checkpoints, say),
        telemetry=Telemetry(home.path if peers.is_chief else None, config.runtime.progress, config.training.batch_size),
        ledger=Ledger(home.path / "ledger.json" if peers.is_chief else None, began),
        attempts=Attempts(home.path / "checkpoints" / "attempts.json" if peers.is_chief else None),
        stop=stop,
        state=RunState(),
        where=where,
        shards=shards,
        divisions=parts,
    )


def settle(config: RunConfig, home: RunFolder, peers: Peers, dataset: Dataset) -> tuple[RunConfig, list[str]]:
    """Choose what is `auto`, as this run did when it began, or now by the advice table; and why, one line a choice."""
    if config.auto is None:
        return config, []

    def choose() -> tuple[dict[str, Any], list[str]]:
        if home.resuming:
            chosen, reasons = adopted(config, home.config)
        else:
            chosen, reasons = advise(config, dataset.splits["train"].count, len(dataset.class_names))
            home.record(chosen)
        return choice_of(chosen), reasons

    choice, reasons = peers.told("advice", choose)
    for reason in reasons:
        say(reason)
    return settled(config, choice), reasons


def resume(job: Run, home: RunFolder) -> None:
    """Load order: this run's newest checkpoint > warm start > what the backbone was built with.

    Only the chief reads; the others get what it read.
    """
    found = job.checkpoints.newest() if home.resuming and job.peers.is_chief else None
    state = job.peers.told("state", lambda: found[0] if found else None)
    if state:
        job.loaded = from_chief(job, "checkpoint", found[1] if found else {})
        job.state = RunState.from_json(state)
        job.saved_step = job.state.step
        variables.write(job.classifier.variables, job.loaded, f"checkpoint step {job.state.step}")
        settle_input(job.classifier.backbone)
        say(f"weights: this run's checkpoint at step {job.state.step}")
    elif job.config.warm_start:
        take_weights(job, job.config.warm_start)
    else:
        say(f"weights: backbone {job.config.model.weights}, head from the seed")
    signs.tell(step=job.state.step, epoch=job.state.epoch + 1)
    if job.peers.is_chief:
        signs.saved()
        job.ledger.resumed(job.state.train_seconds)
        cut_back(job.folder / "metrics.jsonl", job.folder / "logs", job.state.step)
    job.peers.told("attempt", lambda: job.attempts.begin(job.state.step, job.config.runtime.max_fruitless_restarts))


def share_data(job: Run) -> None:
    """Decide who reads what, and with it how many steps an epoch has.

    Raises:
        ConfigError: the checkpoint lies inside an epoch that was shared by file among another number of workers.
    """
    split, workers, config = job.dataset.splits["train"], job.peers.size, job.config
    asked, before = config.data.shard_by, job.state.sharding
    signs.at("opening the training images")
    # Every worker decodes at the same time, whatever the answer will be.
    kept = job.pixels("train").kept if job.images_again else "features"

    def choose() -> str:
        if workers == 1 or len(split.shards) < workers:
            return "record"
        if asked == "auto":
            return before.get("by") or ("file" if kept == "none" else "record")
        return asked

    by = job.peers.told("sharding", choose)
    job.share = Share(job.peers.index, workers, by)
    job.steps_per_epoch = steps_per_epoch(split, config.training.batch_size, job.share)
    now = {"by": by, "workers": workers, "steps_per_epoch": job.steps_per_epoch}
    if before and before != now and "file" in (by, before["by"]):
        longer = before["steps_per_epoch"] != now["steps_per_epoch"]
        if job.state.epoch_step or longer:
            why = "another number of steps" if longer else f"the checkpoint is {job.state.epoch_step} steps inside one"
            raise ConfigError(
                f"the run shared its data by {before['by']} among {before['workers']} workers, and now would by {by} "
                f"among {workers}, which changes what an epoch is ({why}); go on with {before['workers']} workers"
            )
    job.state.sharding = now
    if workers > 1:
        say(f"sharding: by {by} ({'data.shard_by' if asked == by else _why(split, workers, kept)}); "
            + ("every worker takes its rows of each global batch" if by == "record" else
               "worker {} has {} of {} shards with {:,} of {:,} records".format(
                   job.peers.index, *_own_shards(split, workers, job.peers.index))))  # fmt: skip
    job.telemetry.expect(sum(steps_of(phase, config, job.steps_per_epoch) for phase in config.phases.values()))


def _why(split: Split, workers: int, kept: str) -> str:
    if not split.shards:
        return "image files have no shards"
    if len(split.shards) < workers:
        return f"{len(split.shards)} shards cannot be shared by {workers} workers"
    if kept == "features":
        return "chosen since features are kept"
    return "chosen since decoded images are kept" if kept != "none" else "chosen since no decoded images are kept"


def _own_shards(split: Split, workers: int, worker: int) -> tuple[int, int, int, int]:
    """Files that a worker reads, all files, its records, all records. The split may hold a file in many pieces."""
    own, sizes = shards_of_workers(split, workers)[worker], sizes_of_shards(split)
    files = {split.shards[shard].path for shard in own}
    return len(files), len({shard.path for shard in split.shards}), int(sizes[own].sum()), int(sizes.sum())


def take_weights(job: Run, source: str) -> None:
    """Warm start: every variable of the same name and shape from another run's best (or newest) checkpoint, averaged
    where that run had EMA on.
    """
    values: dict[str, np.ndarray] = {}
    where = ""
    if job.peers.is_chief:
        where, values = _read_weights(job, source)
    where = job.peers.told("warm start", lambda: where)
    values = weights_of(from_chief(job, "weights", values))
    own = job.classifier.variables
    fit = {n: v for n, v in own.items() if n in values and tuple(values[n].shape) == tuple(v.shape)}
    if not fit:
        raise DataError(f"warm_start={source}: none of its variables fits this model; is it of another backbone?")
    variables.write(fit, values, source)
    settle_input(job.classifier.backbone)
    say(f"weights: warm start from {where}, {len(fit)} of {len(own)} variables")


def _read_weights(job: Run, source: str) -> tuple[str, dict[str, np.ndarray]]:
    if is_remote(source):
        beside = Path(job.config.runtime.cache_dir).expanduser() / "warm_start"
        Publisher(beside, place(source), None).fetch()
        folder = beside
    else:
        folder = Path(source).expanduser()
    home = folder if (folder / "checkpoints").is_dir() else folder.parent.parent
    there = CheckpointFolder(home / "checkpoints", 1, say)
    pointer = there.folder / "BEST"
    name = folder.name if home != folder else pointer.read_text().strip() if pointer.exists() else ""
    steps = [step for step in there.steps() if there.path(step).name == name] or there.steps()[-1:]
    if not steps:
        raise DataError(f"warm_start={source}: there is no checkpoint; give the output_dir of a run")
    return str(there.path(steps[0])), there.read(steps[0])[1]
