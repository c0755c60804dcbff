"""`python -m trainer.drift reference=RUN log=FILE.jsonl [hours=24] [until=TIME] [output=FILE.png]`:
measure the drift of a served model from its logged predictions and the reference distribution of its export.

    reference=...   output_dir of a run, its export/, a SavedModel, a reference.json, or the folder of the versions of a
                    model: the newest one, and only its own predictions; local or in a bucket
    log=...         predictions logged by `trainer.serve` or `trainer.relay`, a file of JSON lines or a folder of parts;
                    local or in a bucket
    hours=24        use only the predictions of the last 24 hours (default: all)
    until=TIME      end of these hours, as in ISO 8601, in UTC without an offset (default: now)
    output=FILE.png path of the figure (default: drift.png); local or in a bucket

Example: python -m trainer.drift reference=outputs/flowers log=predictions.jsonl hours=24

Exit codes: 0 stable or moderate; 4 shifted; 2 an argument is wrong, or the reference or log cannot be used; 75 the
bucket does not respond.
docs/drift.md describes the measures.
"""

import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from trainer.cli.arguments import parse_arguments
from trainer.cli.process import exit_with_code
from trainer.errors import ConfigError, Drifted
from trainer.evaluation.drift import (
    DriftMeasure,
    LogPeriod,
    find_version,
    format_measures,
    get_most_severe_level,
    measure_drift,
    read_log,
    read_reference,
)
from trainer.monitoring.log import log
from trainer.storage.local import delete_stale_temporary_files
from trainer.storage.path import storage_path

# Argument -> problem that is reported if it is missing, or "" if it is optional.
ARGUMENTS = {"reference": "is required", "log": "is required", "hours": "", "until": "", "output": ""}


def parse_hours(text: str) -> float:
    """Parse the argument `hours`; raise a ConfigError if it is not a number above 0 and below a million."""
    with suppress(ValueError):
        if 0 < (hours := float(text)) < 10**6:
            return hours
    raise ConfigError("must be a positive number", key="hours", value=text, fix="give hours, such as hours=24")


def parse_time(arguments: Mapping[str, str], key: str) -> datetime:
    """Parse the argument `key`, a time in ISO 8601, and convert it to UTC. It defaults to the current time.

    Raises:
        ConfigError: the argument is not a time in ISO 8601.
    """
    if (text := arguments.get(key)) is None:
        return datetime.now(UTC)
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        fix = f"write it as {key}=2026-01-31T02:00"
        raise ConfigError("is not a time in ISO 8601", key=key, value=text, fix=fix) from None
    return time.replace(tzinfo=time.tzinfo or UTC).astimezone(UTC)


def measure(reference_address: str, log_address: str, period: LogPeriod, output: str) -> list[DriftMeasure]:
    """Measure the drift of logged predictions from a reference. Return the measures, log them, and plot them.

    Args:
        reference_address: a run, its export, a SavedModel, a folder of versions, or a reference.json.
        log_address: a file of predictions, or a folder of such files.
        period: selects the predictions to measure by time and by model version.
        output: the PNG file, local or gs://.

    Raises:
        DataError: the reference or the log is missing or corrupt, the log does not fit the reference, or it has no
            predictions in the period (`NoPredictions`).
        Interrupted: a bucket does not respond.
    """
    reference = read_reference(reference_address)
    window, num_invalid = read_log(log_address, reference, period)
    measures = measure_drift(reference, window)
    from trainer.report.drift import draw  # here, because it imports matplotlib

    if (output_path := storage_path(output)).is_local:
        delete_stale_temporary_files(Path(str(output_path)).parent, output_path.name)
    with tempfile.TemporaryDirectory() as temp_dir:
        figure = Path(temp_dir) / "drift.png"
        draw(figure, reference, window, measures)
        output_path.write(figure.read_bytes())
    verdict = f"verdict: {get_most_severe_level(measures)}"
    log.info("\n".join([verdict, *format_measures(measures, num_invalid), f"  figure   {output}"]))
    return measures


def main() -> None:
    """Run `python -m trainer.drift`, and exit with a code of `trainer.errors`."""
    with exit_with_code():
        arguments, _ = parse_arguments(sys.argv[1:] or ["--help"], __doc__, ARGUMENTS)
        hours = parse_hours(arguments["hours"]) if "hours" in arguments else None
        until = parse_time(arguments, "until")
        output = arguments.get("output", "drift.png")
        if not output.endswith(".png"):
            raise ConfigError("must end in .png", key="output", value=output, fix="give the path of a PNG file")
        version = find_version(arguments["reference"])
        period = LogPeriod(
            until - timedelta(hours=hours) if hours else None,
            until if "until" in arguments else None,
            version.name if version else None,
        )
        measures = measure(arguments["reference"], arguments["log"], period, output)
        if get_most_severe_level(measures) == "shifted":
            shifted_names = ", ".join(drift.name for drift in measures if drift.level == "shifted")
            fix = f"inspect {output}, and label some of the new images to evaluate or retrain the model"
            raise Drifted(f"{shifted_names} shifted from reference={arguments['reference']}", fix=fix)


if __name__ == "__main__":
    main()
