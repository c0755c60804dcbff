"""Export the classifier at the end of a run, or any checkpoint of a stored run afterwards."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.images import ImageStore
from trainer.data.open import stage_and_open_run_dataset
from trainer.data.remote import show_addresses_in_errors
from trainer.exporting.bundle import ExportBundle, ParityExamples, as_plain_float32, computes_in_half_precision
from trainer.exporting.formats import RUN_PRECISION_FORMATS, export_formats
from trainer.exporting.model_card import format_labels, write_model_card
from trainer.exporting.reference import compute_reference, write_reference
from trainer.models.classifier import Classifier
from trainer.models.grad_cam import Explainer, make_explainer
from trainer.monitoring.log import log
from trainer.runs.stored_run import (
    LoadedCheckpoint,
    StoredRun,
    disable_pretrained_weights,
    map_to_run_classes,
    open_classifier,
)
from trainer.storage.local import delete_temporary_files, write_atomically, write_json
from trainer.storage.small_files import read_json_or_default, require_json_object
from trainer.types import SplitPredictions, choose_scored_split

BATCH_SIZE = 256  # images that are read and scored at a time
MAX_PARITY_EXAMPLES = 1000  # examples with which each exported file is compared with the classifier (parity check)
MAX_CALIBRATION_IMAGES = 200  # training images for calibrating int8 quantization


def choose_parity_examples(count: int) -> np.ndarray:
    """Choose the examples of a split of `count` examples for the parity check, int64 [n] in ascending order."""
    return _sample_indices(count, MAX_PARITY_EXAMPLES)


def _sample_indices(count: int, max_samples: int) -> np.ndarray:
    """Sample up to `max_samples` distinct indices in [0, `count`), int64 [n] in ascending order.

    The seed is `count`, so all exports of a run use the same examples.
    """
    return np.sort(np.random.default_rng(count).permutation(count)[:max_samples]).astype(np.int64)


def export_classifier(
    folder: Path,
    classifier: Classifier,
    images: ImageStore,
    scored: SplitPredictions,
    explainer: Explainer,
    check: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Write labels.txt, reference.json and the configured formats to `folder`, and check each written format.

    Args:
        images: images of the run's dataset, for the parity check and the calibration of int8.
        scored: predictions for all decodable examples of the test split, or of the validation split if there is no
            test split. Embeddings that it has, those of `choose_parity_examples`, are not computed again.
        explainer: computes probabilities, embeddings and heatmaps of `classifier`.
        check: called before each format and each batch of the parity check; may raise an exception to stop the export.

    Returns:
        By format: `path` relative to `folder`, `bytes`, `refused` (True if the file was deleted because its accuracy
        is too low, which raises no exception), and the scores that `verify.score` documents, such as `accuracy`.

    Raises:
        ModelError: a written file cannot be loaded.
    """
    config = images.config
    dataset = images.dataset
    image_size = classifier.image_size
    if len(scored.embedded_indices):
        positions = np.searchsorted(scored.indices, scored.embedded_indices)
    else:
        positions = choose_parity_examples(len(scored.indices))
    parity_images = images.read_images(scored.split, scored.indices[positions])
    embeddings = np.asarray(scored.embeddings) if len(scored.embeddings) else explainer(parity_images)["embedding"]
    class_names = dataset.class_names
    resize = config.model.resize
    calibration_indices = _sample_indices(dataset.splits["train"].count, MAX_CALIBRATION_IMAGES)
    reference = compute_reference(scored.split, class_names, scored.probabilities, embeddings, image_size, resize)
    reference["orientation"] = config.data.orientation
    probabilities = float32_probabilities = scored.probabilities[positions]
    float32_explainer = explainer
    in_half_precision = computes_in_half_precision(classifier.backbone)
    if in_half_precision and not RUN_PRECISION_FORMATS.issuperset(config.export.formats):
        check()
        with as_plain_float32(classifier.backbone):
            float32_explainer = make_explainer(classifier)
        float32_probabilities = float32_explainer(parity_images)["probabilities"]
    bundle = ExportBundle(
        build_model=classifier.build_keras_model,
        predict=explainer.predict,
        predict_in_float32=float32_explainer.predict,
        explain=explainer.explain,
        variables=explainer.variables,
        class_names=class_names,
        image_size=image_size,
        resize=resize,
        reference=reference,
        calibration_images=lambda: images.read_images("train", calibration_indices),
        orientation=config.data.orientation,
    )
    write_atomically(folder / "labels.txt", format_labels(class_names))
    write_reference(folder / "reference.json", bundle.reference)
    parity_data = ParityExamples(parity_images, scored.labels[positions], probabilities, float32_probabilities)
    return export_formats(folder, config.export.formats, bundle, parity_data, config.export.max_accuracy_drop, check)


def open_images(run: StoredRun, size: int) -> ImageStore:
    """Open the dataset of a stored run, with images of `size` x `size` pixels that are not cached.

    Labels are mapped to the run's classes.

    Raises:
        DataError: the dataset cannot be read, or has a class that is not one of the run's classes.
    """
    uncached = run.config.data.model_copy(update={"cache": "none"})
    config = run.config.model_copy(update={"data": uncached, "model": disable_pretrained_weights(run.config.model)})
    data = stage_and_open_run_dataset(config, log.info, check_stop=lambda _: None, stream=False)
    data = replace(data, dataset=map_to_run_classes(run, data.dataset))
    return ImageStore(data, config, size, check_stop=lambda _: None)


def score_all(explainer: Explainer, images: ImageStore, split: str) -> SplitPredictions:
    """Return predictions for the examples of a split whose images can be decoded.

    Raises:
        DataError: no image can be decoded, or data.on_error is "fail" and an image cannot be decoded.
    """
    labels = images.dataset.splits[split].labels
    batches = [
        explainer(images.read_images(split, np.arange(start, min(start + BATCH_SIZE, len(labels)))))["probabilities"]
        for start in range(0, len(labels), BATCH_SIZE)
    ]
    images.require_readable()
    decodable_indices = np.setdiff1d(np.arange(len(labels)), list(images.open_split(split).unreadable))
    return SplitPredictions(
        split, decodable_indices, labels[decodable_indices], np.concatenate(batches)[decodable_indices]
    )


def export_run(run: StoredRun, folder: Path, checkpoint: LoadedCheckpoint) -> dict[str, Any]:
    """Score a checkpoint of a stored run, export it to `folder`, and return the scores (see `export_classifier`).

    Raises:
        DataError: the run's dataset cannot be read, or has other classes.
        ModelError: the classifier cannot be built, or a written file cannot be loaded.
    """
    classifier = open_classifier(run, checkpoint)
    images = open_images(run, classifier.image_size)
    explainer = make_explainer(classifier)
    split = choose_scored_split(images.dataset.splits)
    log.info(f"exporting {checkpoint.name} (step {checkpoint.step}) of {run.address}, after scoring "
        f"{images.dataset.splits[split].count:,} {split} examples")  # fmt: skip
    with show_addresses_in_errors(images.addresses):
        return export_classifier(folder, classifier, images, score_all(explainer, images, split), explainer)


def _parse_report(report: Any) -> dict[str, Any]:
    """Return the content of report.json with a section `export`. Raise a ValueError or KeyError if it is invalid."""
    return {
        **require_json_object(report),
        "export": require_json_object(report.get("export", {})),
        "test": require_json_object(report["test"]),
    }


def record_exports(run: StoredRun, folder: Path, in_run: bool, exports: dict[str, Any]) -> None:
    """Record an export's scores in the run's report.json and model card, or in export.json in `folder`.

    Args:
        run: the exported run; its configuration is part of the model card.
        folder: folder of the export.
        in_run: whether `folder` is OUTPUT_DIR/export. If so, report.json is updated, unless it is missing or corrupt.
        exports: scores by format, as `export_run` returns them.
    """
    report_path = folder.parent / "report" / "report.json"
    if in_run:
        delete_temporary_files(
            report_path.parent
        )  # temporary files of a killed export, not deleted by `export_formats`
    report = read_json_or_default(report_path, _parse_report, default={}) if in_run else {}
    if not report:
        if in_run and report_path.exists():
            log.info(f"{report_path} is corrupt: it is not updated; the scores are in {folder}/export.json")
        write_json(folder / "export.json", exports)
        return
    report["export"] |= {name: scores | {"path": f"export/{scores['path']}"} for name, scores in exports.items()}
    write_json(report_path, report)
    write_model_card(folder / "model_card.md", report, run.config.model_dump(mode="json"))
