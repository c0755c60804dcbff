"""Exporting a scored classifier, and the choice of the examples that its files are checked on."""

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

READ_AT_ONCE = 256  # images
EXAMPLES = 1000  # of the scored split are sent through every exported file
REPRESENTATIVE = 200  # of the training split, which an int8 file takes its ranges from


def chosen_examples(count: int, most: int) -> np.ndarray:
    """int64: at most `most` indices below `count`, ascending; the same every time, spread over all classes."""
    return np.sort(np.random.default_rng(count).permutation(count)[:most]).astype(np.int64)


def export_classifier(
    home: Path,
    classifier: Classifier,
    images: ImageStore,
    scored: Scored,
    explainer: Explainer,
    check: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Write labels.txt, reference.json and the formats of the configuration below `home`, each checked on held-out
    examples: at the end of a run, and later for `python -m trainer.export`.

    Args:
        scored: the classifier's answers for all examples of a split that it did not learn from.
        check: as in `export_formats`.

    Returns:
        facts by format, as `export_formats`.
    """
    config, dataset, size = images.config, images.dataset, classifier.image_size
    chosen = chosen_examples(len(scored.indices), EXAMPLES)
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
    """The images of a finished run's data at a size in pixels, decoded when they are read."""
    uncached = run.config.data.model_copy(update={"cache": "none"})
    config = run.config.model_copy(update={"data": uncached, "model": without_weights(run.config.model)})
    data = open_run_data(config, log.info, lambda _: None, stream=False)
    check_classes(run, data.dataset)
    return ImageStore(data, config, size, lambda _: None)


def score_all(explainer: Explainer, images: ImageStore, split: str) -> Scored:
    """The probabilities of every example of a split that can be decoded."""
    labels = images.dataset.splits[split].labels
    parts = [
        explainer(images.rows(split, np.arange(start, min(start + READ_AT_ONCE, len(labels)))))["probabilities"]
        for start in range(0, len(labels), READ_AT_ONCE)
    ]
    good = np.setdiff1d(np.arange(len(labels)), list(images.split(split).bad))
    return Scored(split, good, labels[good], np.concatenate(parts)[good])


def export_run(run: FinishedRun, home: Path, checkpoint: LoadedCheckpoint) -> dict[str, Any]:
    """Export a checkpoint of a finished run below `home`; returns the facts by format, as `export_formats`."""
    classifier = open_classifier(run, checkpoint)
    images, explainer = open_images(run, classifier.image_size), make_explainer(classifier)
    split = scored_split(images.dataset.splits)
    log.info(f"exporting {checkpoint.name} (step {checkpoint.step}) of {run.address}, after it has answered for "
        f"{images.dataset.splits[split].count:,} {split} examples")  # fmt: skip
    return export_classifier(home, classifier, images, score_all(explainer, images, split), explainer)


def record_exports(run: FinishedRun, home: Path, is_own: bool, outcomes: dict[str, Any]) -> None:
    """Write the facts by format into the report and the card of the run, or to export.json beside the files."""
    path = home.parent / "report" / "report.json"
    if not is_own or not path.exists():
        write_json(home / "export.json", outcomes)
        return
    report = json.loads(path.read_text())
    report["export"] = report.get("export", {}) | {k: v | {"path": f"export/{v['path']}"} for k, v in outcomes.items()}
    write_json(path, report)
    write_model_card(home / "model_card.md", report, run.config.model_dump(mode="json"))
