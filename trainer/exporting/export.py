"""Export a scored classifier at the end of its run, or later any checkpoint of a stored run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.images import ImageStore
from trainer.data.open import open_run_data
from trainer.data.remote import show_addresses_in_errors
from trainer.exporting.bundle import ExportBundle, ParityExamples, as_plain_float32, computes_in_half_precision
from trainer.exporting.formats import IN_RUN_PRECISION, export_formats
from trainer.exporting.model_card import format_labels, write_model_card
from trainer.exporting.reference import compute_reference, write_reference
from trainer.models.classifier import Classifier
from trainer.models.grad_cam import Explainer, make_explainer
from trainer.monitoring.log import log
from trainer.runs.stored_run import LoadedCheckpoint, StoredRun, map_to_run_classes, open_classifier, without_weights
from trainer.storage.local import delete_unfinished, write_atomically, write_json
from trainer.storage.small_files import read_json_or_default, require_json_object
from trainer.types import Scored, choose_scored_split

BATCH_SIZE = 256  # images that are read and scored at a time
MAX_PARITY_EXAMPLES = 1000  # examples of the scored split in a parity check
MAX_CALIBRATION_IMAGES = 200  # training images with which int8 is calibrated


def _sample_indices(count: int, max_samples: int) -> np.ndarray:
    """Draw at most `max_samples` different indices below `count`, int64, ascending.

    The seed is `count`, so all exports of a run use the same examples.
    """
    return np.sort(np.random.default_rng(count).permutation(count)[:max_samples]).astype(np.int64)


def export_classifier(
    folder: Path,
    classifier: Classifier,
    images: ImageStore,
    scored: Scored,
    explainer: Explainer,
    check: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Write labels.txt, reference.json and the configured formats to `folder`; return the scores by format.

    Args:
        images: the run's dataset, for the parity check and the calibration of int8.
        scored: predictions for all readable examples of the test split, or of the validation split if there is no test
            split.
        explainer: that of `classifier`.
        check: called before each format and each batch of the parity check; it can raise an exception to stop the
            export.

    Returns:
        The result of `export_formats`.

    Raises:
        ModelError: a written file cannot be loaded.
    """
    config, dataset, size = images.config, images.dataset, classifier.image_size
    sampled = _sample_indices(len(scored.indices), MAX_PARITY_EXAMPLES)
    examples = images.rows(scored.split, scored.indices[sampled])
    names, resize, embeddings = dataset.class_names, config.model.resize, explainer(examples)["embedding"]
    calibration = _sample_indices(dataset.splits["train"].count, MAX_CALIBRATION_IMAGES)
    reference = compute_reference(scored.split, names, scored.probabilities, embeddings, size, resize)
    reference["orientation"] = config.data.orientation
    bundle = ExportBundle(
        model=classifier.build_keras_model(),
        explain=explainer.compiled,
        class_names=names,
        image_size=size,
        resize=resize,
        reference=reference,
        calibration_images=lambda: images.rows("train", calibration),
        orientation=config.data.orientation,
    )
    write_atomically(folder / "labels.txt", format_labels(names))
    write_reference(folder / "reference.json", bundle.reference)
    probabilities = float32_probabilities = scored.probabilities[sampled]
    if computes_in_half_precision(bundle.model) and not IN_RUN_PRECISION.issuperset(config.export.formats):
        check()
        with as_plain_float32(bundle.model):
            float32_probabilities = make_explainer(classifier)(examples)["probabilities"]
    held_out = ParityExamples(examples, scored.labels[sampled], probabilities, float32_probabilities)
    return export_formats(folder, config.export.formats, bundle, held_out, config.export.max_accuracy_drop, check)


def open_images(run: StoredRun, size: int) -> ImageStore:
    """Open the dataset of a stored run, with images of `size` x `size` pixels that are not cached.

    Labels are mapped to the classes of the run.

    Raises:
        DataError: the dataset cannot be read, or has a class that the run does not know.
    """
    uncached = run.config.data.model_copy(update={"cache": "none"})
    config = run.config.model_copy(update={"data": uncached, "model": without_weights(run.config.model)})
    data = open_run_data(config, log.info, lambda _: None, stream=False)
    data = replace(data, dataset=map_to_run_classes(run, data.dataset))
    return ImageStore(data, config, size, lambda _: None)


def score_all(explainer: Explainer, images: ImageStore, split: str) -> Scored:
    """Predict all examples of a split, except those whose image cannot be decoded.

    Raises:
        DataError: no image can be decoded, or one cannot and data.on_error is fail.
    """
    labels = images.dataset.splits[split].labels
    batches = [
        explainer(images.rows(split, np.arange(start, min(start + BATCH_SIZE, len(labels)))))["probabilities"]
        for start in range(0, len(labels), BATCH_SIZE)
    ]
    images.require_readable()
    decodable = np.setdiff1d(np.arange(len(labels)), list(images.split(split).bad))
    return Scored(split, decodable, labels[decodable], np.concatenate(batches)[decodable])


def export_run(run: StoredRun, folder: Path, checkpoint: LoadedCheckpoint) -> dict[str, Any]:
    """Score a checkpoint of a stored run, and export it to `folder`; return the scores by format.

    Raises:
        DataError: the dataset of the run cannot be read.
        ModelError: the classifier cannot be built, or a written file cannot be loaded.
    """
    classifier = open_classifier(run, checkpoint)
    images, explainer = open_images(run, classifier.image_size), make_explainer(classifier)
    split = choose_scored_split(images.dataset.splits)
    log.info(f"exporting {checkpoint.name} (step {checkpoint.step}) of {run.address}, after scoring "
        f"{images.dataset.splits[split].count:,} {split} examples")  # fmt: skip
    with show_addresses_in_errors(images.addresses):
        return export_classifier(folder, classifier, images, score_all(explainer, images, split), explainer)


def _parse_report(report: Any) -> dict[str, Any]:
    """Validate a report, and add an empty section `export` if there is none; raise one of `CONTENT_ERRORS`."""
    return {
        **require_json_object(report),
        "export": require_json_object(report.get("export", {})),
        "test": require_json_object(report["test"]),
    }


def record_exports(run: StoredRun, folder: Path, in_run: bool, exports: dict[str, Any]) -> None:
    """Record the scores of an export: in the report and model card of the run, or else in export.json in `folder`.

    Args:
        folder: the folder of the export.
        in_run: whether `folder` is OUTPUT_DIR/export. Then the report is updated, unless it is missing or corrupt.
        exports: scores by format, as `export_run` returns them.
    """
    path = folder.parent / "report" / "report.json"
    if in_run:
        delete_unfinished(path.parent)  # temporary files of a killed export; `export_formats` deletes those in `folder`
    report = read_json_or_default(path, _parse_report, {}) if in_run else {}
    if not report:
        if in_run and path.exists():
            log.info(f"{path} is corrupt: it is not updated; the scores are in {folder}/export.json")
        write_json(folder / "export.json", exports)
        return
    report["export"] |= {name: scores | {"path": f"export/{scores['path']}"} for name, scores in exports.items()}
    write_json(path, report)
    write_model_card(folder / "model_card.md", report, run.config.model_dump(mode="json"))
