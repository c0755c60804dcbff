"""What a phase trains on: images, or what its frozen layers make of them, computed once by all workers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import tensorflow as tf

from trainer.config.schema import Augmentation
from trainer.data.host import usable_cpus
from trainer.data.images import cache_name
from trainer.data.order import shards_of_workers, sizes_of_shards
from trainer.data.pipeline import Kept, to_score
from trainer.errors import Interrupted
from trainer.evaluation.scoring import EvaluationPass
from trainer.features.compute import FeaturePass, Wanted, rows_at_once
from trainer.features.cut import Cut, Tail
from trainer.features.plan import Reads, choose, phase_epochs, stored_dtype
from trainer.features.store import Features, bytes_of, open_features
from trainer.monitoring.health import signs
from trainer.run import GIGABYTE, Run, again, memory_left, say
from trainer.runs.folder import note_facts, read_facts
from trainer.training.step import Network

_FORMAT = 2  # of features on disk; counts up when they change


@dataclass(frozen=True)
class Inputs:
    """Of one phase."""

    network: Network  # what the step trains: the classifier, or its tail
    evaluator: EvaluationPass  # of the same
    training: Kept
    validation: Kept
    augmentation: Augmentation  # still to be done to what is read
    views: int | None  # that it makes of an example; None: another one in each epoch


def choose_features(job: Run) -> None:
    """Cached features or images for each phase: as this run chose when it began, or chosen and noted now."""
    config, split = job.config, job.dataset.splits["train"]

    def choice() -> tuple[dict[str, Reads], list[str]]:
        before = read_facts(job.folder).get("features")
        if before is None and job.state.step:
            before = dict.fromkeys(config.phases, "live")  # by a version that had no others
        if before is not None:
            return {name: before.get(name, "live") for name in config.phases}, []
        epochs = phase_epochs(config, split.count)
        scored = job.dataset.splits["validation"].count
        budget = max(memory_left(job), int(config.runtime.disk_budget_gb * GIGABYTE))
        choices = choose(config, job.divisions, epochs, split.count + scored, scored, budget)
        chosen = {name: choice.reads for name, choice in choices.items()}
        note_facts(job.folder, {"features": chosen})
        return chosen, [c.line(n) for n, c in choices.items()]

    job.reads, lines = job.peers.told("features", choice)
    for line in lines:
        say(line)


def open_inputs(job: Run, name: str) -> Inputs | None:
    """What phase `name` reads, once `apply_thaw` has set what trains in it. May compute features, on all workers.

    Returns:
        None where the run was told to stop meanwhile.

    Raises:
        DataError: an image cannot be read.
        Interrupted: the phase began with cached features, and there is no longer room for them.
    """
    phase, reads = job.config.phases[name], job.reads[name]
    training, augmentation = job.classifier, job.config.augmentation
    views = phase.augmented_views if augmentation.active else None
    if reads != "live":
        job.ledger.mark("compile")
        signs.at("computing features")
        cut = job.divisions[name].cut
        assert cut is not None, "there was one when the run began"
        made = _cached(job, name, ("train", "validation") if reads == "cached" else ("validation",))
        job.ledger.mark("features")
        if job.told_to_stop("while features were computed"):
            return None
        if made is not None:
            tail = Tail(job.classifier, cut)
            evaluator = EvaluationPass(job.strategy, tail)
            if reads == "cached":
                return Inputs(tail, evaluator, made[0], made[1], Augmentation(), None)
            return Inputs(training, evaluator, job.pixels("train"), made[0], augmentation, views)
        if job.state.phase_step:
            raise Interrupted(
                f"phase {name} began with cached features, and there is no room for them: give it with "
                f"runtime.disk_budget_gb, runtime.memory_budget_gb or runtime.cache_dir. {again(job)}"
            )
        say(f"features of phase {name}: live after all, there is no room for them")
        _fall_back(job, name)
    return Inputs(training, job.evaluator, job.pixels("train"), job.pixels("validation"), augmentation, views)


def _fall_back(job: Run, name: str) -> None:
    if job.reads[name] == "cached":
        job.opened.pop("train", None)  # it may now be worth it to keep the images
    job.reads[name] = "live"
    if job.peers.is_chief:
        note_facts(job.folder, {"features": job.reads})


# ---------------------------------------------------------------------------------------------------------------
# Features


def _cached(job: Run, name: str, splits: Sequence[str]) -> list[Features] | None:
    """The features of these splits for phase `name`; None where some worker has no room, or was told to stop.

    Those that later phases will want, and that stay what they are until then, are computed in the same pass.
    """
    compute = FeaturePass(job)
    found: list[Features] = []
    for split in splits:
        features = _open(job, name, split, taken=sum(one.bytes for one in found if one.kept == "memory"))
        if job.peers.any("no room for features", features is None):
            return None
        assert features is not None
        wanted = [Wanted(_cut(job, name), features, needed=True)]
        for later in _as_well(job, name, split):
            # On disk alone: who knows whether there will be memory for it.
            more = _open(job, later, split, beside=sum(w.features.bytes for w in wanted))
            if not job.peers.any("no room for later features", more is None) and more is not None:
                wanted.append(Wanted(_cut(job, later), more, needed=False))
        exchanged = split == "train" and job.share.by == "record" and job.peers.size > 1
        augmentation = job.config.augmentation if split == "train" else Augmentation()
        done = compute.fill(wanted, augmentation, exchanged)
        if job.peers.any("features not done", not done or wanted[0].failed):
            return None
        features.complete()
        if features.bad:
            job.pixels(split).known_bad |= features.bad
        found.append(features)
    return found


def _cut(job: Run, name: str) -> Cut:
    cut = job.divisions[name].cut
    assert cut is not None
    return cut


def _as_well(job: Run, name: str, split: str) -> list[str]:
    """The phases after `name` that read features of a split, of the same views, which nothing changes until then."""
    names, phases = list(job.config.phases), job.config.phases
    moved: set[str] = set()
    found, layers = [], {_cut(job, name).layer}
    for before, later in pairwise(names[names.index(name) :]):
        moved |= job.divisions[before].moves
        if split == "train":
            alike = job.reads[later] == "cached" and phases[later].augmented_views == phases[name].augmented_views
        else:
            alike = job.reads[later] != "live"
        if not alike:
            continue
        cut = _cut(job, later)
        if cut.layer not in layers and not moved & cut.variables.keys():
            found.append(later)
            layers.add(cut.layer)
    return found


def _open(job: Run, name: str, split: str, beside: int | None = None, taken: int = 0) -> Features | None:
    """What earlier starts left of a split's features for phase `name`, to be completed.

    Args:
        taken: bytes of memory that other features of the phase have.
        beside: not for now, but to be left on disk beside this many bytes that are wanted now.
    """
    config, classifier, runtime, phase = job.config, job.classifier, job.config.runtime, job.config.phases[name]
    cut, examples = _cut(job, name), job.dataset.splits[split]
    dtype, augmented = stored_dtype(phase, cut), split == "train" and config.augmentation.active
    views = (phase.augmented_views or 1) if augmented else 1
    images = cache_name(examples, classifier.image_size, config.model.resize, job.dataset.fingerprint)
    key = (
        _FORMAT, images, classifier.kind.name, cut.layer, cut.pooled and classifier.pooling, cut.fingerprint(), dtype,
        runtime.precision, views, (config.seed, config.augmentation.model_dump_json()) if augmented else None,
        rows_at_once(), runtime.deterministic, tf.__version__,
    )  # fmt: skip
    digest = hashlib.sha256("\n".join(map(str, key)).encode()).hexdigest()[:16]
    own, disk = _own(job, split), int(runtime.disk_budget_gb * GIGABYTE)
    if beside is not None and beside + bytes_of(cut.shape, dtype, views, len(own)) > disk:
        return None
    return open_features(
        examples,
        shape=cut.shape,
        dtype=dtype,
        views=views,
        own=own,
        file=Path(runtime.cache_dir).expanduser() / "features" / f"{split}-{digest}",
        memory_budget=memory_left(job) - taken if beside is None else -1,
        disk_budget=disk,
        threads=runtime.data_threads or usable_cpus(),
        note=say,
    )


def _own(job: Run, split: str) -> np.ndarray:
    """The examples that this worker reads: increasing indices."""
    examples, training = job.dataset.splits[split], job.config.training
    if split == "validation":
        return to_score(examples, training.batch_size, training.validation_share, job.share)
    if job.share.by == "record" or job.share.workers == 1:
        return np.arange(examples.count, dtype=np.int64)
    shards, sizes = shards_of_workers(examples, job.share.workers)[job.share.worker], sizes_of_shards(examples)
    return np.flatnonzero(np.isin(np.repeat(np.arange(len(sizes)), sizes), shards))
