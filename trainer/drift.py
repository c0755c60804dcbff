"""`python -m trainer.drift reference=RUN log=FILE.jsonl [hours=24] [output=FILE.png]`:
measure the drift of a served model from its logged predictions and the reference distribution of its export.

    reference=...   output_dir of a run, its export/, a SavedModel, or a reference.json; local or gs://
    log=...         predictions logged by `trainer.serve`, a file of JSON lines or a folder of *.jsonl; local or gs://
    hours=24        use only the predictions of the last 24 hours (default: all)
    output=FILE.png path of the figure (default: drift.png); local or gs://

Example: python -m trainer.drift reference=outputs/flowers log=predictions.jsonl hours=24

Exit codes: 0 stable or moderate; 4 shifted; 2 an argument is wrong, or the reference or log cannot be used; 75 the
bucket does not respond.
docs/drift.md describes the measures.
"""

import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from trainer.cli.arguments import parse_arguments
from trainer.cli.process import exit_with_code
from trainer.errors import ConfigError, Drifted
from trainer.evaluation.drift import format_measures, measure_drift, most_severe_level, read_log, read_reference
from trainer.monitoring.log import log
from trainer.storage.local import delete_abandoned
from trainer.storage.path import storage_path

# Key -> problem if it is missing, "" if it is optional.
ARGUMENTS = {"reference": "is required", "log": "is required", "hours": "", "output": ""}


def _parse_hours(text: str) -> float:
    with suppress(ValueError):
        if (hours := float(text)) > 0:
            return hours
    raise ConfigError("must be a positive number", key="hours", value=text, fix="give hours, such as hours=24")


def main() -> None:
    """Run `python -m trainer.drift`, and exit with a code of `trainer.errors`."""
    with exit_with_code():
        arguments, _ = parse_arguments(sys.argv[1:] or ["--help"], __doc__, ARGUMENTS)
        hours = _parse_hours(arguments["hours"]) if "hours" in arguments else None
        output = arguments.get("output", "drift.png")
        if not output.endswith(".png"):
            raise ConfigError("must end in .png", key="output", value=output, fix="give the path of a PNG file")
        reference = read_reference(arguments["reference"])
        window, invalid = read_log(arguments["log"], reference, hours)
        measured = measure_drift(reference, window)
        from trainer.report.drift import draw

        if (target := storage_path(output)).is_local:
            delete_abandoned(Path(str(target)).parent, target.name)
        with tempfile.TemporaryDirectory() as folder:
            figure = Path(folder) / "drift.png"
            draw(figure, reference, window, measured)
            target.write(figure.read_bytes())
        level = most_severe_level(measured)
        log.info("\n".join([f"verdict: {level}", *format_measures(measured, invalid), f"  figure   {output}"]))
        if level == "shifted":
            shifted = ", ".join(measure.name for measure in measured if measure.level == "shifted")
            fix = f"inspect {output}, and label some of the new images to evaluate or retrain the model"
            raise Drifted(f"{shifted} shifted from reference={arguments['reference']}", fix=fix)


if __name__ == "__main__":
    main()
