"""The command line: Hydra composes, `config.load` validates, `train.run` trains."""

from __future__ import annotations

import sys

from trainer.command_line import compose, exit_code_of, quiet_start, run_sweep_job
from trainer.config import load, without_regularisation
from trainer.training.run_folder import open_run_folder


def _train(arguments: list[str]) -> None:
    composed = compose(arguments, run_job=run_sweep_job)
    if composed is None:  # --help, --cfg or a finished sweep
        return
    config = load(composed)
    config = without_regularisation(config) if config.debug.overfit else config
    home = open_run_folder(config)
    if home.finished:
        print(f"{home.path} is finished already (it holds DONE); its report is {home.path}/report/index.html")
        return
    with quiet_start():
        from trainer import train  # TensorFlow is imported only now: help and mistakes must answer at once

    train.run(config, home)


def main() -> None:
    """Entry point of `python -m trainer`; exits with a documented code (`trainer.errors`)."""
    sys.exit(exit_code_of(_train, sys.argv[1:]))


if __name__ == "__main__":
    main()
