"""`python -m trainer.export run=OUTPUT_DIR [formats=[keras,onnx]] [checkpoint=best|last|STEP] [output=FOLDER]`:
export the model of a run again or in other formats.

    formats=[...]               saved_model keras tflite tflite_float16 tflite_dynamic tflite_int8 onnx (default: those
                                that the run exported)
    checkpoint=best|last|STEP   which weights (default: those that the run exported)
    output=FOLDER               where to write (default: <run>/export, whose report.json and model card are updated and
                                whose other formats stay)
    max_accuracy_drop=0.01      fraction of the scored examples; a format that loses more is deleted

`data.KEY=...` and `runtime.KEY=...` set where the data is now. Exit codes are those of a run.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.cluster.signals import exit_on_sigterm

if __name__ == "__main__":
    exit_on_sigterm()  # the imports below take seconds

import yaml

from trainer.cli.arguments import read_arguments
from trainer.cli.process import exit_with_code, quiet_start
from trainer.errors import ConfigError
from trainer.monitoring.log import log
from trainer.runs.finished_run import FinishedRun, exported_checkpoint, find_run, load_checkpoint

CHANGES = ("formats", "max_accuracy_drop")  # in the section `export` of the run's configuration
OWN = {"run": "give once the run to export", "checkpoint": "", "output": "", **dict.fromkeys(CHANGES, "")}


def changes(given: Mapping[str, str]) -> dict[str, Any]:
    """Return the values that the arguments change in the run's configuration: {"export.formats": ["keras"]}."""
    values = {k: yaml.safe_load(text) for k, text in given.items() if k in CHANGES or "." in k}
    if isinstance(name := values.get("formats"), str):
        values["formats"] = [name]
    return {f"export.{k}" if k in CHANGES else k: value for k, value in values.items()}


def target(run: FinishedRun, own: dict[str, str]) -> tuple[Path, bool]:
    """Return the folder to write to, and whether it is the run's own.

    Raises:
        ConfigError: `output` is required.
    """
    if output := own.get("output"):
        return Path(output).expanduser(), False
    if not run.home.is_local:
        raise ConfigError("is in a bucket", key="run", value=run.address, fix="give output=FOLDER on this machine")
    exported = exported_checkpoint(run)
    if (checkpoint := own.get("checkpoint", exported)) != exported:
        raise ConfigError(
            f"the run exported another checkpoint ({exported}), and a folder holds one model",
            key="checkpoint",
            value=checkpoint,
            fix="give output=FOLDER",
        )
    return Path(str(run.home)) / "export", True


def main() -> None:
    """Entry point of `python -m trainer.export`; exits with a documented code (`trainer.errors`)."""
    with exit_with_code():
        own, _ = read_arguments(sys.argv[1:] or ["--help"], __doc__, OWN, more=r"(data|runtime)\..+")
        run = find_run(own["run"], changes(own))
        home, is_own = target(run, own)
        checkpoint = load_checkpoint(run, own.get("checkpoint"))  # before TensorFlow is imported
        with quiet_start():
            from trainer.exporting.export import export_run, record_exports
            from trainer.exporting.formats import check_formats, raise_if_refused
        check_formats(run.config.export.formats, run.config.model.backbone)
        outcomes = export_run(run, home, checkpoint)
        record_exports(run, home, is_own, outcomes)
        for name, facts in outcomes.items():
            file = "deleted" if facts["refused"] else home / facts["path"]
            log.info(f"  {name:15} {facts['bytes'] / 1e6:8.2f} MB  accuracy {facts['accuracy']:.4f} (trainer "
                f"{facts['trainer_accuracy']:.4f})  differs by {facts['largest_difference']:.1e} at most  "
                f"{facts['timing']['milliseconds_per_image']:7.2f} ms per image  {file}")  # fmt: skip
        raise_if_refused(outcomes, run.config.export.max_accuracy_drop, section="")


if __name__ == "__main__":
    main()
