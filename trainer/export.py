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
from trainer.runs.reader import FinishedRun, exported_checkpoint, find_checkpoint, find_run, open_classifier, open_data
from trainer.storage.local import write_json

if TYPE_CHECKING:
    from trainer.data.images import Pixels
    from trainer.exporting.export import Scored
    from trainer.models.grad_cam import Look
    from trainer.types import Dataset

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


def open_images(run: FinishedRun, dataset: Dataset, split: str, size: int) -> Pixels:
    """The images of a split at a size in pixels, decoded when they are read."""
    from trainer.data.images import open_pixels

    return open_pixels(
        dataset.splits[split],
        size=size,
        resize=run.config.model.resize,
        cache="none",
        cache_dir=Path(run.config.runtime.cache_dir).expanduser(),
        fingerprint=dataset.fingerprint,
        memory_budget=0,
        disk_budget=0,
        threads=run.config.runtime.data_threads,
        on_error=run.config.data.on_error,
        note=lambda _: None,
    )


def score_all(look: Look, pixels: Pixels) -> Scored:
    """Every example of a split that can be decoded."""
    import numpy as np

    from trainer.exporting.export import Scored

    split = pixels.split
    parts = [
        look(pixels.rows(np.arange(start, min(start + READ_AT_ONCE, split.count))))["probabilities"]
        for start in range(0, split.count, READ_AT_ONCE)
    ]
    good = np.setdiff1d(np.arange(split.count), list(pixels.bad))
    return Scored(split.name, good, split.labels[good], np.concatenate(parts)[good])


def export(run: FinishedRun, home: Path, checkpoint: str) -> dict[str, Any]:
    """Write the formats that the configuration names below `home`; facts by format."""
    from trainer.exporting.export import write_exports
    from trainer.models.grad_cam import looker

    dataset = open_data(run)
    folder = find_checkpoint(run, checkpoint)
    classifier = open_classifier(run, folder)
    split = "test" if "test" in dataset.splits else "validation"
    say(f"exporting {folder.name} of {run.address}, after it has answered for {dataset.splits[split].count:,} {split} "
        "examples")  # fmt: skip
    opened = {name: open_images(run, dataset, name, classifier.image_size) for name in (split, "train")}
    look = looker(classifier)
    scored = score_all(look, opened[split])
    return write_exports(
        home, run.config, classifier, dataset, scored, lambda name, some: opened[name].rows(some), look
    )


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


def _run(arguments: list[str]) -> None:
    own, _ = read_arguments(arguments or ["--help"], __doc__, OWN, more=r"(data|runtime)\..+")
    run = find_run(own["run"], changes(own))
    home, is_own = target(run, own)
    checkpoint = own.get("checkpoint") or exported_checkpoint(run)
    find_checkpoint(run, checkpoint)  # mistakes answer before TensorFlow is imported
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


def main() -> None:
    """Entry point of `python -m trainer.export`; exits with a documented code (`trainer.errors`)."""
    with exit_with_code():
        _run(sys.argv[1:])


if __name__ == "__main__":
    main()
