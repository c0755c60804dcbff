"""`python -m trainer.plan [ARGUMENTS OF A RUN] [--plot=FILE.png] [--summary]`:
print the plan of a run without training.

    ARGUMENTS OF A RUN  as of `python -m trainer`: groups (data=digits), keys (seed=7), --cfg job
    --plot=FILE.png     draw the network
    --summary           print the layers of the network

The exit code is 0, or that with which the run would end at its start, with the same message. Nothing is written to
output_dir except a probe that is deleted again.
"""

import os
import sys
from pathlib import Path

from trainer.cluster.signals import end_at_once

if __name__ == "__main__":
    end_at_once()  # what is imported below takes seconds

from trainer.cli.arguments import read_arguments
from trainer.cli.compose import compose, is_sweep
from trainer.cli.process import exit_with_code, quiet_start
from trainer.cluster.discovery import discover
from trainer.config.schema import apply_overfit, load
from trainer.errors import ConfigError
from trainer.storage.base import within

PATIENCE = 30.0  # seconds for each request to a bucket; a run waits longer


def main() -> None:
    """Entry point of `python -m trainer.plan`; exits with a documented code (`trainer.errors`)."""
    with exit_with_code():
        summary = "--summary" in sys.argv[1:]
        arguments = [a for a in sys.argv[1:] if a != "--summary"]
        own, rest = read_arguments(arguments, __doc__, {"--plot": ""}, rest=r"(?!--plot)(?s:.*)")
        plot = Path(own["--plot"]).expanduser() if "--plot" in own else None
        if plot and plot.suffix != ".png":
            raise ConfigError("is no PNG file", key="--plot", value=plot, fix="write --plot=FILE.png")
        if is_sweep(arguments):
            raise ConfigError("a plan is of one run, not of a sweep", fix="leave out --multirun and sweep=...")
        composed = compose(rest)
        if composed is None:  # --cfg
            return
        config = apply_overfit(load(composed))
        with quiet_start():
            from trainer.planning.dry_run import Plan, show_run
        plan = Plan(config, discover(os.environ))
        with within(PATIENCE):
            show_run(plan, rest, plot, summary)
        plan.conclude()


if __name__ == "__main__":
    main()
