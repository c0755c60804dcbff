"""`python -m trainer.plan <what a run would be given> [--plot=FILE.png] [--summary]`:
what that run would do, without doing it.

Exit code 0, or what the run would end with at its start, with the same message. Nothing is written to output_dir but a
probe that is deleted again. `--plot=FILE.png` draws the network, `--summary` prints its layers.
"""

import os
import sys
from pathlib import Path

from trainer.cluster.signals import end_at_once

if __name__ == "__main__":
    end_at_once()  # what is imported below takes seconds

from rich.console import Console

from trainer.cli.arguments import read_arguments
from trainer.cli.compose import asks_for_sweep, compose
from trainer.cli.process import exit_with_code, quiet_start
from trainer.cluster.discovery import discover
from trainer.config.schema import apply_overfit, load
from trainer.errors import ConfigError
from trainer.planning.sections import WIDTH, Plan, look_for_trouble, show_cluster, show_configuration
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
            raise ConfigError("say once where to draw the network: --plot=FILE.png")
        if asks_for_sweep(arguments):
            raise ConfigError("a plan is of one run: leave --multirun and sweep=... out")
        composed = compose(rest)
        if composed is None:  # --cfg
            return
        config = apply_overfit(load(composed))
        cluster = discover(os.environ)
        with quiet_start():
            from trainer.exporting.formats import check_formats
            from trainer.planning.checks import devices
            from trainer.planning.dry_run import show_network
        described, replicas = devices(config, cluster)
        plan = Plan(config, cluster, Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False))
        phases = []
        with plan.fault():
            check_formats(config.export.formats, config.model.backbone)
        with within(PATIENCE):
            show_configuration(plan, rest)
            show_cluster(plan, described)
            with plan.fault():  # said at the end, beside what else was found
                phases = show_network(plan, replicas, plot, summary)
        look_for_trouble(plan, phases)
        plan.conclude()


if __name__ == "__main__":
    main()
