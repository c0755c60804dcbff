"""`python -m trainer.export run=OUTPUT_DIR [formats=[keras,onnx]] [checkpoint=best|last|STEP] [output=FOLDER]`:
the model of a run in other formats, or again.

    formats=[...]               saved_model keras tflite tflite_float16 tflite_dynamic tflite_int8 onnx; those that the
                                run exported where it is left out
    checkpoint=best|last|STEP   which weights; what the run exported where it is left out
    output=FOLDER               where to; <run>/export where it is left out: its report.json and model card are brought
                                up to date, and formats that are not asked for stay
    max_accuracy_drop=0.01      of the scored examples; a file that is worse is not kept

`data.KEY=...` and `runtime.KEY=...` say where the data is now. Exit codes are those of a run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.cluster.signals import end_at_once

if __name__ == "__main__":
    end_at_once()  # what is imported below takes seconds

import yaml

from trainer.cli.arguments import read_arguments
from trainer.cli.process import exit_with_code, quiet_start
from trainer.errors import ConfigError, ModelError
from trainer.monitoring.log import say
from trainer.runs.reader import (
    FinishedRun,
    LoadedCheckpoint,
    check_classes,
    exported_checkpoint,
    find_run,
    load_checkpoint,
    open_classifier,
    without_weights,
)
from trainer.storage.local import write_json

if TYPE_CHECKING:
    from trainer.data.images import ImageStore
    from trainer.models.grad_cam import Explainer
    from trainer.types import Scored

READ_AT_ONCE = 256  # images
CHANGES = {"formats": "export.formats", "max_accuracy_drop": "export.max_accuracy_drop"}  # in the run's configuration
OWN = {"run": "say once which run", "checkpoint": "", "output": "", **dict.fromkeys(CHANGES, "")}


def changes(told: Mapping[str, str]) -> dict[str, Any]:
    """What the arguments change of the configuration of the run."""
    values = {CHANGES.get(key, key): yaml.safe_load(text) for key, text in told.items() if key in CHANGES or "." in key}
    if isinstance(one := values.get("export.formats"), str):
        values["export.formats"] = [one]
    return values


def target(run: FinishedRun, own: dict[str, str]) -> tuple[Path, bool]:
    """The folder to write into, and whether it is the run's own.

    Raises:
        ConfigError: it must be named.
    """
    if output := own.get("output"):
        return Path(output).expanduser(), False
    if not run.home.is_local:
        raise ConfigError(f"run={run.address} is in a bucket: give output=FOLDER on this machine")
    if own.get("checkpoint") not in (None, exported_checkpoint(run)):
        raise ConfigError(
            f"checkpoint={own['checkpoint']} is not what the run exported ({exported_checkpoint(run)}): give "
            "output=FOLDER, so that one folder holds one model"
        )
    return Path(str(run.home)) / "export", True


def open_images(run: FinishedRun, size: int) -> ImageStore:
    """The images of a run's data at a size in pixels, decoded when they are read."""
    from trainer.data.images import ImageStore
    from trainer.data.open import open_run_data

    unkept = {"data": run.config.data.model_copy(update={"cache": "none"}), "model": without_weights(run.config.model)}
    config = run.config.model_copy(update=unkept)
    data = open_run_data(config, say, lambda _: None, stream=False)
    check_classes(run, data.dataset)
    return ImageStore(data, config, size, lambda _: None)


def score_all(explainer: Explainer, images: ImageStore, split: str) -> Scored:
    """Every example of a split that can be decoded."""
    import numpy as np

    from trainer.types import Scored

    labels = images.dataset.splits[split].labels
    parts = [
        explainer(images.rows(split, np.arange(start, min(start + READ_AT_ONCE, len(labels)))))["probabilities"]
        for start in range(0, len(labels), READ_AT_ONCE)
    ]
    good = np.setdiff1d(np.arange(len(labels)), list(images.split(split).bad))
    return Scored(split, good, labels[good], np.concatenate(parts)[good])


def export(run: FinishedRun, home: Path, checkpoint: LoadedCheckpoint) -> dict[str, Any]:
    """Write the formats that the configuration names below `home`; facts by format."""
    from trainer.exporting.export import export_classifier
    from trainer.models.grad_cam import make_explainer

    classifier = open_classifier(run, checkpoint)
    images, explainer = open_images(run, classifier.image_size), make_explainer(classifier)
    split = "test" if "test" in images.dataset.splits else "validation"
    say(f"exporting {checkpoint.name} (step {checkpoint.step}) of {run.address}, after it has answered for "
        f"{images.dataset.splits[split].count:,} {split} examples")  # fmt: skip
    return export_classifier(home, classifier, images, score_all(explainer, images, split), explainer)


def record(run: FinishedRun, home: Path, is_own: bool, outcomes: dict[str, Any]) -> None:
    """Write what was measured: into the report and the card of the run, or as export.json beside the files."""
    from trainer.exporting.model_card import write_model_card

    report = home.parent / "report" / "report.json"
    if not is_own or not report.exists():
        write_json(home / "export.json", outcomes)
        return
    told = json.loads(report.read_text())
    told["export"] = told.get("export", {}) | {k: v | {"path": f"export/{v['path']}"} for k, v in outcomes.items()}
    write_json(report, told)
    write_model_card(home / "model_card.md", told, run.config.model_dump(mode="json"))


def main() -> None:
    """Entry point of `python -m trainer.export`; exits with a documented code (`trainer.errors`)."""
    with exit_with_code():
        own, _ = read_arguments(sys.argv[1:] or ["--help"], __doc__, OWN, more=r"(data|runtime)\..+")
        run = find_run(own["run"], changes(own))
        home, is_own = target(run, own)
        checkpoint = load_checkpoint(run, own.get("checkpoint"))  # mistakes answer before TensorFlow is imported
        with quiet_start():
            from trainer.exporting.formats import check_formats, refuse
        check_formats(run.config.export.formats, run.config.model.backbone)
        outcomes = export(run, home, checkpoint)
        record(run, home, is_own, outcomes)
        for name, facts in outcomes.items():
            say(
                f"  {name:15} {facts['bytes'] / 1e6:8.2f} MB  accuracy {facts['accuracy']:.4f} (trainer "
                f"{facts['trainer_accuracy']:.4f})  differs by {facts['largest_difference']:.1e} at most  "
                f"{facts['timing']['milliseconds_per_image']:7.2f} ms an image  "
                + ("not kept" if facts["refused"] else str(home / facts["path"]))
            )
        try:
            refuse(outcomes, run.config.export.max_accuracy_drop)
        except ModelError as error:
            raise ModelError(str(error).replace("export.formats", "formats").replace("export.max", "max")) from None


if __name__ == "__main__":
    main()
