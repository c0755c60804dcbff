"""Export of a scored classifier, at the end of a run or of a checkpoint later."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.images import ImageStore
from trainer.data.open import open_run_data
from trainer.exporting.bundle import ExportBundle, ParityExamples
from trainer.exporting.formats import export_formats
from trainer.exporting.model_card import write_labels, write_model_card
from trainer.exporting.reference import reference_distribution, write_reference
from trainer.models.classifier import Classifier
from trainer.models.grad_cam import Explainer, explain, make_explainer
from trainer.monitoring.log import log
from trainer.runs.finished_run import FinishedRun, LoadedCheckpoint, check_classes, open_classifier, without_weights
from trainer.storage.local import write_json
from trainer.types import Scored, scored_split

READ_BATCH = 256  # images
PARITY_EXAMPLES = 1000  # at most, of the scored split
REPRESENTATIVE = 200  # training images at most that calibrate an int8 file


def chosen_examples(count: int, most: int) -> np.ndarray:
    """Draw at most `most` of `count` indices, int64, ascending; the same every time, spread over all classes."""
    return np.sort(np.random.default_rng(count).permutation(count)[:most]).astype(np.int64)


def export_classifier(
    home: Path,
    classifier: Classifier,
    images: ImageStore,
    scored: Scored,
    explainer: Explainer,
    check: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Write labels.txt, reference.json and the configured formats below `home`; returns facts as `export_formats`.

    Args:
        scored: the predictions for all examples of a split that the classifier was not trained on.
        check: as in `export_formats`.
    """
    config, dataset, size = images.config, images.dataset, classifier.image_size
    chosen = chosen_examples(len(scored.indices), PARITY_EXAMPLES)
    examples = images.rows(scored.split, scored.indices[chosen])
    names, resize, embeddings = dataset.class_names, config.model.resize, explainer(examples)["embedding"]
    bundle = ExportBundle(
        model=classifier.keras_model(),
        explain=lambda pixels: explain(classifier, pixels),
        class_names=names,
        image_size=size,
        resize=resize,
        reference=reference_distribution(scored.split, names, scored.probabilities, embeddings, size, resize),
        examples=lambda: images.rows("train", chosen_examples(dataset.splits["train"].count, REPRESENTATIVE)),
    )
    write_labels(home / "labels.txt", names)
    write_reference(home / "reference.json", bundle.reference)
    held_out = ParityExamples(examples, scored.labels[chosen], scored.probabilities[chosen])
    return export_formats(home, config.export.formats, bundle, held_out, config.export.max_accuracy_drop, check)


def open_images(run: FinishedRun, size: int) -> ImageStore:
    """Open the images of a finished run's data at a size in pixels, without a cache."""
    uncached = run.config.data.model_copy(update={"cache": "none"})
    config = run.config.model_copy(update={"data": uncached, "model": without_weights(run.config.model)})
    data = open_run_data(config, log.info, lambda _: None, stream=False)
    check_classes(run, data.dataset)
    return ImageStore(data, config, size, lambda _: None)


def score_all(explainer: Explainer, images: ImageStore, split: str) -> Scored:
    """Predict every example of a split that can be decoded."""
    labels = images.dataset.splits[split].labels
    parts = [
        explainer(images.rows(split, np.arange(start, min(start + READ_BATCH, len(labels)))))["probabilities"]
        for start in range(0, len(labels), READ_BATCH)
    ]
    good = np.setdiff1d(np.arange(len(labels)), list(images.split(split).bad))
    return Scored(split, good, labels[good], np.concatenate(parts)[good])


def export_run(run: FinishedRun, home: Path, checkpoint: LoadedCheckpoint) -> dict[str, Any]:
    """Export a checkpoint of a finished run below `home`; returns the facts by format, as `export_formats`."""
    classifier = open_classifier(run, checkpoint)
    images, explainer = open_images(run, classifier.image_size), make_explainer(classifier)
    split = scored_split(images.dataset.splits)
    log.info(f"exporting {checkpoint.name} (step {checkpoint.step}) of {run.address}, after scoring "
        f"{images.dataset.splits[split].count:,} {split} examples")  # fmt: skip
    return export_classifier(home, classifier, images, score_all(explainer, images, split), explainer)


def record_exports(run: FinishedRun, home: Path, is_own: bool, outcomes: dict[str, Any]) -> None:
    """Write the facts by format to the report and model card of the run, or to export.json next to the files."""
    path = home.parent / "report" / "report.json"
    if not is_own or not path.exists():
        write_json(home / "export.json", outcomes)
        return
    report = json.loads(path.read_text())
    report["export"] = report.get("export", {}) | {k: v | {"path": f"export/{v['path']}"} for k, v in outcomes.items()}
    write_json(path, report)
    write_model_card(home / "model_card.md", report, run.config.model_dump(mode="json"))
