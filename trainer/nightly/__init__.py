"""`python -m trainer.nightly to=FOLDER log=FOLDER runs=FOLDER [hours=24] [keep=5] [now=TIME] [KEY=VALUE ...]`:
retrain a served model if its predictions have drifted, and promote the result unless it is worse.

    to=...     folder of the versions of the served model, as for `trainer.promote`; local or in a bucket
    log=...    prediction log of `trainer.serve`, as for `trainer.drift`; local or in a bucket
    runs=...   folder of the runs, each named by its first day (in UTC), and of the records, nights/DAY.json
    hours=24   the predictions of the last 24 hours are compared with the reference of the served version
    keep=5     number of versions to retain
    now=TIME   time of the night, as in ISO 8601, in UTC without an offset (default: the current time)
    KEY=VALUE  configuration of the runs, as for `python -m trainer`; not output_dir and warm_start

Example: python -m trainer.nightly to=models/any log=predictions runs=outputs/nightly data=image_folder data.root=photos

A run starts from the weights of the served version's run. If it is interrupted, the next start continues it on any day,
without a new measurement. Without any version, the first night trains one. docs/kubernetes.md has the manifest. Exit
codes: 0 promoted, or nothing to do; 5 the run is worse than the served version; 75 interrupted, the same command
continues; 2 and 3 as in `python -m trainer`, after which the next night trains a new run.
"""

import sys

from trainer.cli.arguments import parse_arguments
from trainer.cli.compose import compose, load_and_require_read
from trainer.cli.process import configure_log, exit_with_code
from trainer.cli.source import choose_source
from trainer.config.typed import quote_if_needed
from trainer.drift import parse_hours, parse_time
from trainer.errors import ConfigError
from trainer.nightly.night import Settings, run_night
from trainer.promote import parse_keep

# Argument -> problem that is reported if it is missing, or "" if it is optional.
ARGUMENTS = {"to": "is required", "log": "is required", "runs": "is required", "hours": "", "keep": "", "now": ""}


def main() -> None:
    """Run `python -m trainer.nightly`, and exit with a code of `trainer.errors`."""
    with exit_with_code():
        arguments, overrides = parse_arguments(
            sys.argv[1:] or ["--help"], __doc__, ARGUMENTS, other_arguments=r"[^-~].*=(?s:.*)"
        )
        for key in ("output_dir", "warm_start"):
            if any(override.lstrip("+").startswith(f"{key}=") for override in overrides):
                raise ConfigError("is set by trainer.nightly", key=key, fix="remove it")
        hours, keep = parse_hours(arguments.get("hours", "24")), parse_keep(arguments)
        now = parse_time(arguments, "now")
        runs = arguments["runs"].rstrip("/")
        run_overrides, _ = choose_source([*overrides, f"output_dir={quote_if_needed(f'{runs}/{now:%Y-%m-%d}')}"])
        composed = compose(run_overrides)
        assert composed is not None, "no argument is one of Hydra's flags"
        # Before the drift is measured, so that errors in the configuration are raised first.
        config = load_and_require_read(composed, run_overrides)
        configure_log(config.runtime)
        versions_folder, predictions_log = (arguments[key].rstrip("/") for key in ("to", "log"))
        run_night(Settings(versions_folder, predictions_log, runs, hours, keep, tuple(overrides)), now, config.runtime)
