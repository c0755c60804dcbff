"""From scores to a report: what it needs of the images, the model and TensorBoard."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.data.augment.apply import augment
from trainer.data.augment.mixing import mixed
from trainer.data.images import Pixels, data_errors
from trainer.data.pipeline import chosen_batches, chosen_gate
from trainer.evaluation.duplicates import MEMBERS, SIDE, Member, described, find_duplicates, shrink
from trainer.evaluation.metrics import evaluate_arrays
from trainer.monitoring.health import signs
from trainer.report.page import MEMBERS_SHOWN, SHOWN, Pictures, Repeats, Samples
from trainer.report.schema import Report
from trainer.report.write import describe_data, write_report
from trainer.run import Run, say
from trainer.runs.folder import versions
from trainer.types import EvaluationResult, Split

MOST_COMPARED = 100_000  # pictures of all splits together that duplicates are looked for in
READ_AT_ONCE = 64  # images
FETCHED_AT_ONCE = 512  # images, where their shards come from a bucket: all shards of so many have to be here together


def evaluated(
    job: Run, split: str, probabilities: np.ndarray, labels: np.ndarray, indices: np.ndarray
) -> EvaluationResult:
    """The scores of what `trainer.run.score` answers for a split, by group where the data has groups."""
    groups = job.dataset.splits[split].groups
    return evaluate_arrays(
        split,
        job.dataset.class_names,
        labels,
        probabilities,
        tuple(job.name_of(split, int(i)) for i in indices),
        [groups[int(i)] for i in indices] if groups else None,
        job.config.data.group_field or "",
    )


def report_on(
    job: Run,
    folder: Path,
    result: EvaluationResult,
    indices: np.ndarray,
    facts: Mapping[str, Any],
    splits: Sequence[str],
    check: Callable[[], None] = lambda: None,
) -> Report:
    """Write the report on `result`, whose rows are the examples `indices` of its split.

    Args:
        facts: what else `write_report` may say of a run: title, export, timing, note, history, phases.
        splits: duplicates are looked for in these.
        check: called while images are read; may raise to leave.
    """
    split = result.split
    found = repeats(job, splits, check)  # reads more images, so that more may be known of those that are damaged
    return write_report(
        folder,
        result=result,
        history=facts.get("history", []),
        phases=facts.get("phases", {}),
        run={
            "seed": job.config.seed,
            "data": describe_data(job.dataset) | {"undecodable": undecodable(job)},
            "config": job.config.model_dump(mode="json"),
            "versions": versions(),
            **facts,
        },
        pictures=Pictures(
            images=lambda wanted: pictures(job, split, indices[list(wanted)]),
            samples=samples(job) if "train" in splits else None,
            explain=lambda wanted: job.look(pictures(job, split, indices[list(wanted)]))["heatmap"],
            repeats=found,
        ),
    )


def pictures(job: Run, split: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """uint8 [k, S, S, 3]: decoded images of a split by example index."""
    return job.pixels(split).rows(np.asarray(indices, np.int64))


def samples(job: Run) -> Samples:
    """A dozen training pictures, and the first of them as eight epochs see it."""
    split = job.dataset.splits["train"]
    chosen = np.sort(np.random.default_rng(job.config.seed).permutation(split.count)[:12])
    shown = pictures(job, "train", chosen)
    augmented = views(job, shown, chosen) if job.config.augmentation.active else None
    return Samples(shown, [job.dataset.class_names[i] for i in split.labels[chosen]], augmented)


def views(job: Run, shown: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """uint8 [8, S, S, 3]: the first of the training pictures `shown`, of the examples `chosen`, as eight epochs see it.

    Where examples are mixed, the others of `shown` are mixed in.
    """
    augmentation, seed = job.config.augmentation, job.config.seed
    each = 2 if augmentation.mixes else 1  # a pair is mixed, and its first is shown
    epochs, which = np.repeat(np.arange(8), each), np.zeros(8 * each, np.int64)
    if augmentation.mixes:
        which[1::2] = (np.arange(8) + 1) % len(chosen)
    with tf.device("CPU"):  # where the pipeline computes it
        images = augment(shown[which], augmentation, seed, epochs, chosen[which])
        if augmentation.mixes:
            labels, weight = tf.zeros(16, tf.int32), tf.ones(16)
            batch = {"image": images, "label": labels, "weight": weight, "index": chosen[which]}
            images = mixed(batch, augmentation, seed, epochs)["image"]
    return np.asarray(images[::each])


def undecodable(job: Run) -> list[str]:
    """Examples that counted for nothing (data.on_error=skip), with the reason."""
    return [
        f"{job.name_of(name, index)}: {reason}"
        for name, opened in sorted(job.opened.items())
        for index, reason in sorted(opened.bad.items())
    ]


# ---------------------------------------------------------------------------------------------------------------
# Duplicates


def shares(counts: Mapping[str, int], most: int = MOST_COMPARED) -> dict[str, int]:
    """How many pictures of each split are compared: all, or `most` in all, the small splits whole before the large."""
    taken: dict[str, int] = {}
    for place, name in enumerate(sorted(counts, key=lambda n: counts[n])):
        taken[name] = min(counts[name], (most - sum(taken.values())) // (len(counts) - place))
    return taken


def chosen_of(split: Split, wanted: int) -> np.ndarray:
    """Which pictures of a split are compared where not all are: the first records (shards are shuffled when they are
    prepared, and so few of them are fetched), or files at even distances (a folder of files is ordered by class).
    """
    if wanted >= split.count or split.shards:
        return np.arange(min(wanted, split.count), dtype=np.int64)
    return np.linspace(0, split.count - 1, wanted).astype(np.int64)


def small_pictures(pixels: Pixels, wanted: np.ndarray, check: Callable[[], None]) -> np.ndarray:
    """uint8 [k, 16, 16, 3] of the examples `wanted`, increasing indices; where images are not kept, the next ones are
    decoded meanwhile.
    """
    if pixels.shards and len(wanted) > FETCHED_AT_ONCE:
        parts = [wanted[at : at + FETCHED_AT_ONCE] for at in range(0, len(wanted), FETCHED_AT_ONCE)]
        return np.concatenate([small_pictures(pixels, part, check) for part in parts])
    batches = iter(chosen_batches(pixels, wanted, rows=READ_AT_ONCE, replicas=1, threads=pixels.threads))
    gate = chosen_gate(pixels, wanted, rows=READ_AT_ONCE, replicas=1)
    small = np.zeros((len(wanted) + READ_AT_ONCE, SIDE, SIDE, 3), np.uint8)  # room for the padding of the last batch
    with data_errors(pixels):
        for start in range(0, len(wanted), READ_AT_ONCE):
            gate.before(READ_AT_ONCE)
            small[start : start + READ_AT_ONCE] = shrink(next(batches)["image"].numpy())
            signs.moved()
            check()
    del batches
    gate.close()
    return small[: len(wanted)]


def repeats(job: Run, splits: Sequence[str], check: Callable[[], None]) -> Repeats:
    """Look for pictures that occur more than once among at most 100,000, which bounds time and memory (77 MB)."""
    thumbnails: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    taken = shares({name: job.dataset.splits[name].count for name in splits})
    for name in splits:
        wanted = chosen_of(job.dataset.splits[name], taken[name])
        small = small_pictures(job.pixels(name), wanted, check)
        good = ~np.isin(wanted, list(job.pixels(name).bad))
        thumbnails[name] = wanted[good], small[good]
    found = find_duplicates(thumbnails, {name: job.dataset.splits[name].labels for name in splits})
    groups = [
        [Member(s, i, job.name_of(s, i), job.dataset.class_names[job.dataset.splits[s].labels[i]]) for s, i in group]
        for group in (whole[:MEMBERS] for whole in found.groups)
    ]
    shown = [[pictures(job, m.split, [m.index])[0] for m in group[:MEMBERS_SHOWN]] for group in groups[:SHOWN]]
    return Repeats(described(found, groups), shown)


# ---------------------------------------------------------------------------------------------------------------
# TensorBoard


def show_in_tensorboard(folder: Path, logs: Path, report: Mapping[str, Any], step: int) -> None:
    """The figures of the report in `folder` as images of TensorBoard, in a log of their own that is written anew."""
    shutil.rmtree(logs, ignore_errors=True)
    writer = tf.summary.create_file_writer(str(logs))
    with writer.as_default(step=step), tf.device("CPU"):
        for name, file in report["figures"].items():
            image = tf.io.decode_png((folder / file).read_bytes(), channels=3)
            tf.summary.image(f"report/{name}", image[None])
    writer.close()
    say(f"figures: {folder}, and in TensorBoard under {logs.name}")
