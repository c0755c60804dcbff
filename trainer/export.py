"""`python -m trainer.export run=OUTPUT_DIR [formats=[keras,onnx]] [checkpoint=best|last|STEP] [output=FOLDER]`:
export the model of a run again, in other formats, or from another checkpoint.

    formats=[...]               saved_model keras tflite tflite_float16 tflite_dynamic tflite_int8 onnx (default: those
                                in the configuration of the run)
    checkpoint=best|last|STEP   weights to export (default: those of the end of the run), or a phase that has ended
    output=FOLDER               local folder to write to (default: RUN/export, where files of other formats are left as
                                they are; report.json and model card of the run are updated)
    max_accuracy_drop=0.01      fraction of the scored examples; a format that loses significantly more is deleted

Example: python -m trainer.export run=outputs/flowers formats=[keras,onnx]

`data.KEY=...` and `runtime.KEY=...` replace values of the run's configuration, such as `data.root` if the data was
moved. Exit codes: 0 done; 2 wrong input, or a format was deleted; 75 stopped, or the bucket does not respond.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.cluster.signals import exit_on_sigterm

if __name__ == "__main__":
    exit_on_sigterm()  # SIGTERM and SIGINT end the process during the imports below, which take seconds

from trainer.cli.arguments import parse_arguments
from trainer.cli.overrides import parse_value
from trainer.cli.process import exit_with_code, suppress_import_noise
from trainer.errors import ConfigError
from trainer.monitoring.log import log
from trainer.runs.stored_run import StoredRun, find_run, load_checkpoint

EXPORT_KEYS = ("formats", "max_accuracy_drop")  # arguments that replace values of the run's section `export`
# Argument -> problem that is reported if it is missing, or "" if it is optional.
ARGUMENTS = {"run": "is required", "checkpoint": "", "output": "", **dict.fromkeys(EXPORT_KEYS, "")}


def _parse_changes(arguments: Mapping[str, str]) -> dict[str, Any]:
    """Return the changes to the run's configuration, such as {"export.formats": ["keras"]}."""
    text_by_key = {f"export.{key}" if key in EXPORT_KEYS else key: text for key, text in arguments.items()}
    return {key: parse_value(f"{key}={text}") for key, text in text_by_key.items() if "." in key}


def _choose_output(run: StoredRun, arguments: Mapping[str, str]) -> tuple[Path, bool]:
    """Return the folder to write to, and whether it is the run's `export` folder.

    Raises:
        ConfigError: there is no argument `output`, and the run is in a bucket or exports another checkpoint.
    """
    if output := arguments.get("output"):
        return Path(output).expanduser(), False
    if not run.folder.is_local:
        raise ConfigError("is in a bucket", key="run", value=run.address, fix="give output=FOLDER on this machine")
    exported = run.config.training.keep
    if (checkpoint := arguments.get("checkpoint", exported)) != exported:
        raise ConfigError(
            f"is not the checkpoint of the run's export ({exported}), and all files of a folder have the same weights",
            key="checkpoint",
            value=checkpoint,
            fix="give output=FOLDER",
        )
    return Path(str(run.folder)) / "export", True


def main() -> None:
    """Run `python -m trainer.export`, and exit with a code of `trainer.errors`."""
    with exit_with_code():
        arguments, _ = parse_arguments(sys.argv[1:] or ["--help"], __doc__, ARGUMENTS, other_keys=r"(data|runtime)\..+")
        run = find_run(arguments["run"], _parse_changes(arguments))
        folder, in_run = _choose_output(run, arguments)
        # Before the import of TensorFlow, so that an invalid checkpoint is reported immediately.
        checkpoint = load_checkpoint(run, arguments.get("checkpoint"))
        with suppress_import_noise():
            from trainer.exporting.export import export_run, record_exports
            from trainer.exporting.formats import check_formats, raise_if_refused
        check_formats(run.config.export.formats, run.config.model.backbone)
        exports = export_run(run, folder, checkpoint)
        record_exports(run, folder, in_run, exports)
        for name, export in exports.items():
            file = "deleted" if export["refused"] else folder / export["path"]
            log.info(f"  {name:15} {export['bytes'] / 1e6:8.2f} MB  accuracy {export['accuracy']:.4f} (trainer "
                f"{export['trainer_accuracy']:.4f})  differs by {export['largest_difference']:.1e} at most  "
                f"{export['timing']['milliseconds_per_image']:7.2f} ms per image  {file}")  # fmt: skip
        raise_if_refused(exports, run.config.export.max_accuracy_drop, section="")


if __name__ == "__main__":
    main()
