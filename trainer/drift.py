"""`python -m trainer.drift reference=RUN log=FILE.jsonl [hours=24] [output=FILE.png]`:
compare the logged predictions of a served model with those on its test split.

    reference=...   output_dir of a run, its export/, a SavedModel, or a reference.json; local or gs://
    log=...         predictions logged by the server, JSON lines; a file, or a folder with *.jsonl; local or gs://
    hours=24        only predictions of the last 24 hours; by default all of them
    output=FILE.png path of the figure, drift.png by default; local or gs://

Exit codes: 0 stable or moderate; 4 shifted; 2 the reference or the log cannot be used; 75 the bucket does not respond.
docs/drift.md describes the measures.
"""

import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from trainer.cli.arguments import read_arguments
from trainer.cli.process import exit_with_code
from trainer.errors import ConfigError, Drifted
from trainer.evaluation.drift import format_measures, measures, read_log, read_reference, verdict
from trainer.monitoring.log import log
from trainer.storage.path import storage_path

REQUEST = "give reference=... and log=..., each once"
KEYS = {"reference": REQUEST, "log": REQUEST, "hours": "", "output": ""}


def _hours(text: str) -> float:
    with suppress(ValueError):
        if (hours := float(text)) > 0:
            return hours
    raise ConfigError("is not a number above 0", key="hours", value=text, fix="give hours, such as hours=24")


def main() -> None:
    """Entry point of `python -m trainer.drift`; exits with a documented code (`trainer.errors`)."""
    with exit_with_code():
        arguments, _ = read_arguments(sys.argv[1:] or ["--help"], __doc__, KEYS)
        hours = _hours(arguments["hours"]) if "hours" in arguments else None
        output = arguments.get("output", "drift.png")
        if not output.endswith(".png"):
            raise ConfigError("does not end in .png", key="output", value=output, fix="give the path of a PNG file")
        reference = read_reference(arguments["reference"])
        window, invalid = read_log(arguments["log"], reference, hours)
        measured = measures(reference, window)
        from trainer.report.drift import draw

        with tempfile.TemporaryDirectory() as folder:
            figure = Path(folder) / "drift.png"
            draw(figure, reference, window, measured)
            storage_path(output).write(figure.read_bytes())
        level = verdict(measured)
        log.info("\n".join([f"verdict: {level}", *format_measures(measured, invalid), f"  figure   {output}"]))
        if level == "shifted":
            shifted, name = ", ".join(m.name for m in measured if m.level == "shifted"), arguments["reference"]
            raise Drifted(
                f"{shifted} shifted from reference={name}", fix=f"open {output}, label some of the new images, retrain"
            )


if __name__ == "__main__":
    main()
