"""`python -m trainer.drift reference=RUN log=FILE.jsonl [hours=24] [output=FILE.png]`:
has what a model sees and says moved since it was exported?

    reference=...   a run's output_dir, its export/, a SavedModel, or a reference.json; local or gs://
    log=...         predictions that the server logged, JSON lines; a file, or a folder with *.jsonl; local or gs://
    hours=24        only predictions of the last so many hours
    output=FILE.png the figure; drift.png where it is left out; local or gs://

Exit codes: 0 nothing has shifted; 4 something has; 2 the reference or the log cannot be used; 75 the bucket is away.
docs/drift.md says what is measured.
"""

import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from trainer.cli.arguments import read_arguments
from trainer.cli.process import exit_with_code
from trainer.errors import ConfigError, Drifted
from trainer.evaluation.drift import measures, read_log, read_reference, verdict, words
from trainer.monitoring.log import log
from trainer.storage.path import storage_path

REQUEST = "name a reference and a log, each once"
KEYS = {"reference": REQUEST, "log": REQUEST, "hours": "", "output": ""}


def _hours(text: str) -> float:
    with suppress(ValueError):
        if (hours := float(text)) > 0:
            return hours
    raise ConfigError(f"hours={text}: must be a number above 0")


def main() -> None:
    """Entry point of `python -m trainer.drift`; exits with a documented code (`trainer.errors`)."""
    with exit_with_code():
        given, _ = read_arguments(sys.argv[1:] or ["--help"], __doc__, KEYS)
        hours = _hours(given["hours"]) if "hours" in given else None
        output = given.get("output", "drift.png")
        if not output.endswith(".png"):
            raise ConfigError(f"output={output}: must end in .png")
        reference = read_reference(given["reference"])
        window, unusable = read_log(given["log"], reference, hours)
        found = measures(reference, window)
        from trainer.report.drift import draw

        with tempfile.TemporaryDirectory() as folder:
            drawn = Path(folder) / "drift.png"
            draw(drawn, reference, window, found)
            storage_path(output).write(drawn.read_bytes())
        level = verdict(found)
        log.info("\n".join([f"verdict: {level}", *words(found, unusable), f"  figure   {output}"]))
        if level == "shifted":
            moved = ", ".join(m.name for m in found if m.level == "shifted")
            raise Drifted(
                f"{moved} shifted against {given['reference']}: look at {output}, label some of what is new, retrain"
            )


if __name__ == "__main__":
    main()
