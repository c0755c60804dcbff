"""The command line: Hydra composes, `config.load` validates, `train.run` trains."""

from __future__ import annotations

import os
import sys

from trainer.command_line import Sweep, compose, exit_code_of
from trainer.config import load


def _train(arguments: list[str]) -> None:
    composed = compose(arguments, run_job=Sweep(arguments))
    if composed is None:  # --help, --cfg or a finished sweep
        return
    config = load(composed)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # what remains is worth reading
    from trainer import train  # TensorFlow is imported only now: help and mistakes must answer at once

    train.run(config)


def main() -> None:
    """Entry point of `python -m trainer`; exits with a documented code (`trainer.errors`)."""
    sys.exit(exit_code_of(_train, sys.argv[1:]))


if __name__ == "__main__":
    main()
