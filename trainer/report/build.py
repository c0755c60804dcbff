"""Building a report from scores: its pictures, heatmaps and duplicates, and its figures in TensorBoard."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.config.schema import Augmentation
from trainer.data.augment.apply import augment
from trainer.data.augment.mixing import mixed
from trainer.data.images import ImageStore, Pixels, data_errors
from trainer.data.pipeline import chosen_batches
from trainer.evaluation.duplicates import MEMBERS, SIDE, Member, described, find_duplicates, shrink
from trainer.evaluation.metrics import evaluate_arrays
from trainer.models.grad_cam import Explainer
from trainer.monitoring.health import health
from trainer.monitoring.log import log
from trainer.report.page import MEMBERS_SHOWN, SHOWN, Pictures, Repeats, Samples
from trainer.report.schema import Report
from trainer.report.write import describe_data, write_report
from trainer.runs.folder import versions
from trainer.types import Scored

MOST_COMPARED = 100_000  # pictures of all splits together that duplicates are looked for in
READ_AT_ONCE = 64  # images
FETCHED_AT_ONCE = 512  # images, where their shards come from a bucket: all shards of so many have to be here together


def build_report(
    folder: Path,
    scored: Scored,
    images: ImageStore,
    explain: Explainer,
    facts: Mapping[str, Any],
    splits: Sequence[str],
    check: Callable[[], None],
) -> Report:
    """Write the report on a classifier's answers for a split; returns the content of report.json.

    Args:
        facts: of the run, as `write_report`: title, export, timing, note, history, phases.
        splits: duplicates are looked for in these.
        check: called while images are read; may raise to leave.
    """
    split, indices, config, dataset = scored.split, scored.indices, images.config, images.dataset
    repeated = repeats(images, splits, check)  # before `undecodable`: it reads images that may be damaged
    names, groups = [images.name_of(split, i) for i in indices.tolist()], dataset.splits[split].groups
    by_group, field = [groups[i] for i in indices.tolist()] if groups else None, config.data.group_field or ""
    classes, labels, probabilities = dataset.class_names, scored.labels, scored.probabilities
    result = evaluate_arrays(split, classes, labels, probabilities, names, by_group, field)
    run = {
        "seed": config.seed,
        "data": describe_data(dataset) | {"undecodable": images.undecodable()},
        "config": config.model_dump(mode="json"),
        "versions": versions(),
        **facts,
    }

    def rows(wanted: Sequence[int]) -> np.ndarray:
        return images.rows(split, indices[list(wanted)])

    shown = samples(images) if "train" in splits else None
    pictures = Pictures(rows, shown, lambda wanted: explain(rows(wanted))["heatmap"], repeated)
    history, phases = facts.get("history", []), facts.get("phases", {})
    return write_report(folder, result=result, history=history, phases=phases, run=run, pictures=pictures)


def samples(images: ImageStore) -> Samples:
    """A dozen training pictures, and eight augmented views of the first."""
    split, config = images.dataset.splits["train"], images.config
    chosen = np.sort(np.random.default_rng(config.seed).permutation(split.count)[:12])
    shown = images.rows("train", chosen)
    augmented = views(config.augmentation, config.seed, shown, chosen) if config.augmentation.active else None
    return Samples(shown, [images.dataset.class_names[i] for i in split.labels[chosen]], augmented)


def views(augmentation: Augmentation, seed: int, shown: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """uint8 [8, S, S, 3]: the first of the training pictures `shown`, of the examples `chosen`, as eight epochs see it.

    Where examples are mixed, the others of `shown` are mixed in.
    """
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


def compared_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """Pictures of each split to compare: all, or 100,000 of them together, the small splits whole before the large."""
    taken: dict[str, int] = {}
    for rank, name in enumerate(sorted(counts, key=lambda n: counts[n])):
        taken[name] = min(counts[name], (MOST_COMPARED - sum(taken.values())) // (len(counts) - rank))
    return taken


def small_pictures(pixels: Pixels, wanted: np.ndarray, check: Callable[[], None]) -> np.ndarray:
    """uint8 [k, 16, 16, 3] of the examples `wanted`, increasing indices; where images are not cached, the next ones are
    decoded meanwhile.
    """
    if pixels.shards and len(wanted) > FETCHED_AT_ONCE:
        parts = np.split(wanted, range(FETCHED_AT_ONCE, len(wanted), FETCHED_AT_ONCE))
        return np.concatenate([small_pictures(pixels, part, check) for part in parts])
    batches = chosen_batches(pixels, wanted, rows=READ_AT_ONCE, replicas=1)
    stream, gate = iter(batches.dataset), batches.gate()
    small = np.zeros((len(wanted) + READ_AT_ONCE, SIDE, SIDE, 3), np.uint8)  # room for the padding of the last batch
    with data_errors(pixels):
        for start in range(0, len(wanted), READ_AT_ONCE):
            gate.wait_for(READ_AT_ONCE)
            small[start : start + READ_AT_ONCE] = shrink(next(stream)["image"].numpy())
            health.progress()
            check()
    del stream
    gate.close()
    return small[: len(wanted)]


def repeats(images: ImageStore, splits: Sequence[str], check: Callable[[], None]) -> Repeats:
    """Look for pictures that occur more than once among at most 100,000, which bounds time and memory (77 MB)."""
    dataset, thumbnails = images.dataset, dict[str, tuple[np.ndarray, np.ndarray]]()
    taken = compared_counts({name: dataset.splits[name].count for name in splits})
    for name in splits:
        wanted, split = np.arange(taken[name], dtype=np.int64), dataset.splits[name]
        if len(wanted) < split.count and not split.shards:  # a folder of files is ordered by class; shards are shuffled
            wanted = np.linspace(0, split.count - 1, len(wanted)).astype(np.int64)
        small = small_pictures(images.split(name), wanted, check)
        good = ~np.isin(wanted, list(images.split(name).bad))
        thumbnails[name] = wanted[good], small[good]
    labels = {name: dataset.splits[name].labels for name in splits}
    found = find_duplicates(thumbnails, labels)
    groups = [
        [Member(s, i, images.name_of(s, i), dataset.class_names[labels[s][i]]) for s, i in group[:MEMBERS]]
        for group in found.groups
    ]
    shown = [[images.rows(m.split, [m.index])[0] for m in group[:MEMBERS_SHOWN]] for group in groups[:SHOWN]]
    return Repeats(described(found, groups), shown)


def show_in_tensorboard(folder: Path, logs: Path, report: Mapping[str, Any], step: int) -> None:
    """The figures of the report in `folder` as images of TensorBoard, in a log of their own that is written anew."""
    shutil.rmtree(logs, ignore_errors=True)
    writer = tf.summary.create_file_writer(str(logs))
    with writer.as_default(step=step), tf.device("CPU"):
        for name, file in report["figures"].items():
            image = tf.io.decode_png((folder / file).read_bytes(), channels=3)
            tf.summary.image(f"report/{name}", image[None])
    writer.close()
    log.info(f"figures: {folder}, and in TensorBoard under {logs.name}")
