"""`python -m trainer.plan [ARGUMENTS OF A RUN] [--plot=FILE.png] [--summary]`:
print the plan of a run without training.

    ARGUMENTS OF A RUN  those of `python -m trainer`: groups (data=digits), keys (seed=7), --cfg job
    --plot=FILE.png     draw the network
    --summary           list the layers of the network: index, output, dtype, parameters, phases that train it

Example: python -m trainer.plan data=image_folder data.root=photos --plot=model.png

The exit code is 0, or the one with which the run would end at its start, with the same message; 75 if the server of the
weights or of the dataset cannot be reached. Nothing is downloaded, and nothing is written to output_dir except a small
file that is deleted again.
"""

import os
import sys
from pathlib import Path

from trainer.cluster.signals import exit_on_sigterm

if __name__ == "__main__":
    exit_on_sigterm()  # SIGTERM and SIGINT end the process during the imports below, which take seconds

from trainer.cli.arguments import parse_arguments
from trainer.cli.compose import compose, load_and_require_read, requests_sweep
from trainer.cli.process import choose_and_log_source, exit_with_code, suppress_import_noise
from trainer.cluster.discovery import discover
from trainer.config.schema import apply_overfit
from trainer.errors import ConfigError
from trainer.storage.base import request_deadline

BUCKET_DEADLINE_SECONDS = 30.0  # for a request with its retries; shorter than in a run, because a user is waiting


def main() -> None:
    """Run `python -m trainer.plan`, and exit with a code of `trainer.errors`."""
    with exit_with_code():
        with_summary = "--summary" in sys.argv[1:]
        arguments = [a for a in sys.argv[1:] if a != "--summary"]
        options, run_arguments = parse_arguments(
            arguments, __doc__, {"--plot": ""}, other_arguments=r"(?!--plot)(?s:.*)"
        )
        plot = Path(options["--plot"]).expanduser() if "--plot" in options else None
        if plot and plot.suffix != ".png":
            raise ConfigError("is not a PNG file", key="--plot", value=plot, fix="write --plot=FILE.png")
        if requests_sweep(arguments):
            raise ConfigError("a sweep has no plan, only a single run has one", fix="remove --multirun and sweep=...")
        run_arguments = choose_and_log_source(run_arguments)
        composed = compose(run_arguments)
        if composed is None:  # --cfg
            return
        config = apply_overfit(load_and_require_read(composed, run_arguments))
        with suppress_import_noise():
            from trainer.planning.dry_run import Plan, show_run
        plan = Plan(config, discover(os.environ))
        with request_deadline(BUCKET_DEADLINE_SECONDS):
            show_run(plan, run_arguments, plot, with_summary)
        plan.show_warnings_and_raise()


if __name__ == "__main__":
    main()
