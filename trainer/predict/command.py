"""Predict images, and write the predictions, the page and the summary to an output folder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import DataError, SomeUnreadable
from trainer.monitoring.health import health
from trainer.monitoring.log import log
from trainer.predict.images import ImageFile
from trainer.predict.model import Model, Preprocessing, make_decoder
from trainer.predict.page import write_page
from trainer.predict.parts import Parts, compute_parts_identity, predict_images
from trainer.predict.results import Overview, format_summary, summarize, write_tables
from trainer.report.page import INDEX
from trainer.runs.folder import collect_versions
from trainer.storage.base import StoragePath, encode_json
from trainer.storage.local import delete_stale_temporary_files, write_atomically

# Preprocessing of the page's images if the model's own is unknown, because the model decodes images itself.
UNKNOWN_PREPROCESSING = Preprocessing(224, "crop", "exif")


@dataclass(frozen=True)
class Options:
    """The options of a prediction, and facts about its command for the page and the summary."""

    source: str  # the argument `images`, as the user wrote it
    top: int  # number of most probable classes per image
    flip: bool  # average the probabilities of each image and its mirror image
    tta: dict[str, Any]  # result of `tta.measure_flip`, or {"problem": reason}; {} without `flip`
    command: str  # the command line, which the page shows
    print_line: Callable[[str], None] | None = None  # called with a JSON line per image, then one with the summary


def predict_parts(
    model: Model, images: Sequence[ImageFile], output: StoragePath, flip: bool, check: Callable[[], None]
) -> Parts:
    """Predict the images in parts, and write each part. Parts that an interrupted command has written are not repeated.

    `check` is called after each batch, and can raise to stop.
    """
    parts = Parts(output, compute_parts_identity(model, images, flip), len(images), len(model.class_names))
    missing = [i for i in range(len(parts)) if parts.read(i) is None]
    if len(missing) < len(parts):
        num_stored = sum(len(parts.get_image_indices(i)) for i in set(range(len(parts))) - set(missing))
        log.info(f"resuming after {num_stored:,} of {len(images):,} images")
    image_count = 0

    def report(count: int) -> None:
        nonlocal image_count
        image_count += count
        health.record_progress(image_count, len(images))
        check()

    for index in missing:
        indices = parts.get_image_indices(index)
        parts.write(index, predict_images(model, images[indices.start : indices.stop], flip, report))
        if len(missing) > 1:
            log.info(f"predicted {indices.stop:,} of {len(images):,} images")
    return parts


def predict_into(
    model: Model, images: Sequence[ImageFile], output: StoragePath, options: Options, check: Callable[[], None]
) -> dict[str, Any]:
    """Predict images and write predictions.csv, probabilities.npy, predictions.json and index.html to `output`.

    If the same command was killed before, continue after the last part that it wrote. The predictions are then
    bit-identical to those of one uninterrupted command.

    Args:
        check: called after each batch; can raise to stop.

    Returns:
        The content of predictions.json.

    Raises:
        DataError: none of the images can be read. All files are written; predictions.csv has the reasons.
        Interrupted: a bucket does not respond.
        SomeUnreadable: some of the images cannot be read. All files are written.
        StopRequested: `check` has raised it.
    """
    with tempfile.TemporaryDirectory(prefix="kubetune-predict-") as temp_dir:
        folder = Path(str(output)) if output.is_local else Path(temp_dir)
        delete_stale_temporary_files(folder)
        parts = predict_parts(model, images, output, options.flip, check)
        overview = write_tables(folder, images, model.class_names, parts, options.top, options.print_line)
        summary = build_summary(model, overview, options)
        decode = model.decode or make_decoder(UNKNOWN_PREPROCESSING)
        write_page(folder / INDEX, summary, images, model.class_names, overview, decode)
        write_atomically(folder / "predictions.json", encode_json(summary, allow_nan=False))
        if not output.is_local:
            for file in sorted(folder.iterdir()):
                (output / file.name).upload(file)
        parts.delete_all()
    lines = format_summary(summary, images, overview.errors)
    log.info("\n".join([*lines, f"  page   {output}/{INDEX}", f"  table  {output}/predictions.csv"]))
    if options.print_line:
        options.print_line(json.dumps({"summary": summary}))
    require_readable(overview, images, options.source, f"{output}/predictions.csv")
    return summary


def build_summary(model: Model, overview: Overview, options: Options) -> dict[str, Any]:
    """Return the content of predictions.json. It contains no times, so that equal inputs give equal content."""
    distance = model.distance
    return {
        "source": options.source,
        "model": model.name,
        "class_names": list(model.class_names),
        **summarize(overview, model.class_names),
        "reference_rms": distance.reference_rms if distance else None,
        "reference_split": distance.split if distance else None,
        "no_distance": model.no_distance_reason,
        "tta": options.tta,
        "notes": list(model.notes),
        "command": options.command,
        "versions": collect_versions(),
    }


def require_readable(overview: Overview, images: Sequence[ImageFile], source: str, table: str) -> None:
    """Raise a DataError if no image could be read, or SomeUnreadable if some could not be read.

    Args:
        source: the argument `images`, for the message.
        table: address of predictions.csv, for the message.
    """
    if not overview.errors:
        return
    index, reason = next(iter(overview.errors.items()))
    first = f"the first: {images[index].name}: {reason}"
    if not overview.readable:
        problem = f"none of the {len(images):,} images can be read, {first}"
        raise DataError(problem, key="images", value=source, fix="give images in JPEG, PNG, BMP, GIF or WebP")
    problem = f"{len(overview.errors):,} of {len(images):,} images could not be read, {first}"
    raise SomeUnreadable(problem, key="images", value=source, fix=f"the others are predicted; {table} has the reasons")


def configure_reproducible_predictions(deterministic: bool) -> None:
    """Configure TensorFlow as an evaluation does, so that the predictions are bit-identical to its predictions.

    Must be called before the first tensor is created.

    Args:
        deterministic: use deterministic operations, as the run does if runtime.deterministic is set.
    """
    import tensorflow as tf

    from trainer.cluster.devices import set_thread_pools
    from trainer.data.host import count_usable_cpus

    set_thread_pools(count_usable_cpus())
    if deterministic:
        tf.config.experimental.enable_op_determinism()
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
