"""Build the report of a scored split from its predictions and images, and write its figures for TensorBoard."""

import io
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf
from PIL import Image
from tensorboard.plugins.image.metadata import create_summary_metadata

from trainer.config.schema import Augmentation
from trainer.data.augment.apply import augment
from trainer.data.augment.mixing import mix_pairs
from trainer.data.images import ImageStore, Pixels, convert_data_errors
from trainer.data.pipeline import build_indexed_batches
from trainer.evaluation.duplicates import THUMBNAIL_SIDE, find_duplicates, make_thumbnails
from trainer.evaluation.metrics import score_predictions
from trainer.monitoring.health import health
from trainer.monitoring.log import log
from trainer.report.page import (
    MAX_ENTRIES_WITH_IMAGES,
    MAX_IMAGES_PER_GROUP,
    DuplicateImages,
    ReportImages,
    TrainingSamples,
)
from trainer.report.schema import Report
from trainer.report.write import describe_data, write_report
from trainer.runs.folder import collect_versions
from trainer.types import SplitPredictions

if TYPE_CHECKING:  # this import loads Keras, which `trainer.look`, another caller, does not need
    from trainer.models.grad_cam import Explainer

MAX_COMPARED_IMAGES = 100_000  # images in the search for duplicates, over all splits; their thumbnails take 77 MB
READ_BATCH = 64  # images per batch in the search for duplicates
SAMPLE_COUNT = 12  # number of training images in the report
NUM_AUGMENTED_VIEWS = 8  # number of augmented views of the first of them
FETCH_BATCH = 512  # images per input pipeline if shards are in a bucket; limits the shards on the local disk


def build_report(
    folder: Path,
    scored: SplitPredictions,
    images: ImageStore,
    explain: "Explainer",
    report_fields: Mapping[str, Any],
    splits: Sequence[str],
    check: Callable[[], None],
) -> Report:
    """Write the report on the predictions for a split to `folder`; return the content of report.json.

    Args:
        images: the images of all splits, with the dataset and the configuration.
        explain: computes the Grad-CAM heatmaps.
        report_fields: content of report.json that is not computed here, such as `title` and `timing`; the keys are
            those of `run` in `trainer.report.write.write_report`.
        splits: the splits that are searched for duplicates; training samples are shown if "train" is one of them.
        check: called after each batch of the search for duplicates; may raise an exception to abort the report.

    Raises:
        DataError: an image cannot be read and data.on_error is "fail", or the predictions are not finite.
    """
    split = scored.split
    indices = scored.indices
    config = images.config
    dataset = images.dataset
    duplicates = find_duplicate_images(images, splits, check)  # first, as it adds corrupt images to `undecodable`
    names = [images.name_of(split, i) for i in indices.tolist()]
    groups = dataset.splits[split].groups
    group_names = [groups[i] for i in indices.tolist()] if groups else None
    group_field = config.data.group_field or ""
    class_names = dataset.class_names
    labels = scored.labels
    probabilities = scored.probabilities
    result = score_predictions(
        split, class_names, labels, probabilities, names, groups=group_names, group_field=group_field
    )
    result = replace(result, sources=images.list_sources(split, indices))
    data = describe_data(dataset)
    report_content = {
        "seed": config.seed,
        "data": data
        | {"undecodable": images.list_undecodable(), "notes": data["notes"] + images.describe_readable_counts()},
        "config": config.model_dump(mode="json"),
        "versions": collect_versions(),
        **report_fields,
    }

    def fetch(rows: Sequence[int]) -> np.ndarray:
        return images.read_images(split, indices[list(rows)])

    samples = select_training_samples(images) if "train" in splits else None
    report_images = ReportImages(fetch, samples, lambda rows: explain(fetch(rows))["heatmap"], duplicates)
    return write_report(folder, result, report_content, report_images)


def select_training_samples(images: ImageStore) -> TrainingSamples:
    """Select `SAMPLE_COUNT` random training images, and augment the first one if augmentation is configured."""
    split, config = images.dataset.splits["train"], images.config
    indices = np.sort(np.random.default_rng(config.seed).permutation(split.count)[:SAMPLE_COUNT])
    originals = images.read_images("train", indices)
    augmented = (
        augment_views(config.augmentation, config.seed, originals, indices) if config.augmentation.active else None
    )
    return TrainingSamples(originals, [images.dataset.class_names[i] for i in split.labels[indices]], augmented)


def augment_views(augmentation: Augmentation, seed: int, images: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Return views of the first image, uint8 [NUM_AUGMENTED_VIEWS, S, S, 3]; arguments as in `augment_examples`."""
    return augment_examples(augmentation, seed, images, indices, count=1)[0]


def augment_examples(
    augmentation: Augmentation, seed: int, images: np.ndarray, indices: np.ndarray, count: int
) -> np.ndarray:
    """Augment each of the first `count` images as in the first `NUM_AUGMENTED_VIEWS` epochs of training.

    Mixup and CutMix mix an image with the next one in the first epoch, the one after that in the second, and so on.

    Args:
        images: uint8 [k, S, S, 3] with k >= `count`.
        indices: indices of the images in the training split, int64 [k], on which the random parameters depend.

    Returns:
        The augmented images, uint8 [count, NUM_AUGMENTED_VIEWS, S, S, 3].
    """
    rows_per_view = 2 if augmentation.mixes else 1  # `mix_pairs` mixes pairs of rows; the first of them is the view
    epochs = np.tile(np.repeat(np.arange(NUM_AUGMENTED_VIEWS), rows_per_view), count)
    rows = np.repeat(np.arange(count), NUM_AUGMENTED_VIEWS * rows_per_view)
    if augmentation.mixes:
        rows[1::2] = (rows[1::2] + epochs[1::2] + 1) % len(indices)
    with tf.device("CPU"):  # as in the input pipeline
        views = augment(images[rows], augmentation, seed, epochs, indices[rows])
        if augmentation.mixes:
            labels, weight = tf.zeros(len(rows), tf.int32), tf.ones(len(rows))
            batch = {"image": views, "label": labels, "weight": weight, "index": indices[rows]}
            views = mix_pairs(batch, augmentation, seed, epochs)["image"]
    return np.asarray(views[::rows_per_view]).reshape(count, NUM_AUGMENTED_VIEWS, *images.shape[1:])


def allocate_comparisons(counts: Mapping[str, int], limit: int = MAX_COMPARED_IMAGES) -> dict[str, int]:
    """Divide `limit` images equally among the splits; what small splits do not need is divided among the larger ones.

    `counts` maps each split to its number of images, the result maps it to the number of images to compare.
    """
    allocated: dict[str, int] = {}
    for rank, name in enumerate(sorted(counts, key=lambda n: counts[n])):
        allocated[name] = min(counts[name], (limit - sum(allocated.values())) // (len(counts) - rank))
    return allocated


def read_thumbnails(pixels: Pixels, indices: np.ndarray, check: Callable[[], None]) -> np.ndarray:
    """Read images and return their thumbnails, uint8 [k, 16, 16, 3]. An unreadable image has a meaningless thumbnail.

    `indices`, int64 [k], ascending, select the images. `check` is called after each batch; it may raise to abort.
    """
    if pixels.shards and len(indices) > FETCH_BATCH:
        index_batches = np.split(indices, range(FETCH_BATCH, len(indices), FETCH_BATCH))
        return np.concatenate([read_thumbnails(pixels, batch_indices, check) for batch_indices in index_batches])
    batches = build_indexed_batches(pixels, indices, rows_per_batch=READ_BATCH, num_replicas=1)
    stream = iter(batches.dataset)
    gate = batches.open_gate()
    shape = (len(indices) + READ_BATCH, THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3)  # with the padding of the last batch
    thumbnails = np.zeros(shape, np.uint8)
    health.record_progress(0, len(indices))
    with convert_data_errors(pixels):
        for start in range(0, len(indices), READ_BATCH):
            gate.wait_for(READ_BATCH)
            thumbnails[start : start + READ_BATCH] = make_thumbnails(next(stream)["image"].numpy())
            health.record_progress(min(start + READ_BATCH, len(indices)), len(indices))
            check()
    del stream
    gate.close()
    return thumbnails[: len(indices)]


def find_duplicate_images(images: ImageStore, splits: Sequence[str], check: Callable[[], None]) -> DuplicateImages:
    """Find duplicates among all images of `splits`, or among a sample if there are more than `MAX_COMPARED_IMAGES`.

    `check` is called after each batch; it may raise to abort.

    Raises:
        DataError: an image cannot be read and data.on_error is "fail".
    """
    dataset = images.dataset
    thumbnails = dict[str, tuple[np.ndarray, np.ndarray]]()
    counts = allocate_comparisons({name: dataset.splits[name].count for name in splits})
    for name in splits:
        indices = np.arange(counts[name], dtype=np.int64)
        split = dataset.splits[name]
        # Files are ordered by class, so they are sampled at equal intervals. Records of shards are not ordered.
        if len(indices) < split.count and not split.shards:
            indices = np.linspace(0, split.count - 1, len(indices)).astype(np.int64)
        split_thumbnails = read_thumbnails(images.open_split(name), indices, check)
        readable = ~np.isin(indices, list(images.open_split(name).unreadable))
        thumbnails[name] = indices[readable], split_thumbnails[readable]
    labels = {name: dataset.splits[name].labels for name in splits}

    def describe(split: str, index: int) -> dict[str, Any]:
        label = dataset.class_names[labels[split][index]]
        return {"split": split, "index": index, "file": images.name_of(split, index), "label": label}

    duplicates = find_duplicates(thumbnails, labels, describe)
    shown_groups = [group["members"][:MAX_IMAGES_PER_GROUP] for group in duplicates["groups"][:MAX_ENTRIES_WITH_IMAGES]]
    group_images = [[images.read_images(m["split"], [m["index"]])[0] for m in members] for members in shown_groups]
    return DuplicateImages(duplicates, group_images)


def write_tensorboard_images(folder: Path, logs: Path, report: Mapping[str, Any], step: int) -> None:
    """Write the figures of the report in `folder` to `logs`, which is replaced, as TensorBoard images of `step`.

    The PNG files are written as they are: `tf.summary.image` would encode their pixels again, which takes longer than
    drawing them. Its format is a tensor of strings: width, height, and one PNG per image.
    """
    shutil.rmtree(logs, ignore_errors=True)
    writer = tf.summary.create_file_writer(str(logs))
    metadata = create_summary_metadata(None, None)
    with writer.as_default(step=step), tf.device("CPU"):
        for name, file in report["figures"].items():
            png = (folder / file).read_bytes()
            width, height = Image.open(io.BytesIO(png)).size
            tf.summary.write(f"report/{name}", tf.constant([str(width), str(height), png]), metadata=metadata)
    writer.close()
    log.info(f"figures: {folder}, and in TensorBoard under {logs.name}")
