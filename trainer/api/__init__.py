"""The Python interface: train, evaluate and predict from a program or a notebook.

    from trainer import api

    result = api.train("experiment=photos", "data.root=photos", "output_dir=outputs/flowers")
    result.report["test"]["accuracy"]
    result.predict("new_photos").labels

Training and evaluation run `python -m trainer` and `python -m trainer.evaluate` in child processes; predictions are
computed in this process. Errors are subclasses of `trainer.errors.TrainerError`, such as `CommandFailed`. See
docs/api.md.
"""

from trainer.api.processes import CommandFailed, run_command
from trainer.api.result import Predictions, Report, Result, open_run
from trainer.cli.compose import compose, load_and_require_read
from trainer.cli.source import choose_source
from trainer.config.schema import RequestedConfig, apply_overfit
from trainer.config.typed import format_argument
from trainer.errors import ConfigError
from trainer.runs.folder import create_output_folder

__all__ = ["CommandFailed", "Predictions", "Report", "Result", "load", "open_run", "train"]


def load(*overrides: str) -> RequestedConfig:
    """Compose and validate a run's configuration without training.

    Args:
        overrides: the arguments of `python -m trainer`, such as "data.root=photos"; no options such as "--cfg".

    Raises:
        ConfigError: an override is an option, or the configuration is invalid; the error lists all problems.
        DataError: `data.root` is not a supported dataset.
    """
    if option := next((argument for argument in overrides if argument.startswith("-")), None):
        raise ConfigError("is an option of the command line", key=option, fix="give KEY=VALUE or GROUP=NAME")
    arguments, _ = choose_source(list(overrides))
    composed = compose(arguments)
    assert composed is not None, "there are no options"
    return apply_overfit(load_and_require_read(composed, arguments))


def train(*overrides: str, show_log: bool = True) -> Result:
    """Train or resume a run in a child process, wait for it to end, and return its results.

    A run that is already finished is not trained again. The run has a single worker on this machine: environment
    variables that describe a cluster are not passed to it. Ctrl-C, or interrupting a notebook's cell, makes the run
    save a checkpoint and stop; the same call resumes it.

    Args:
        overrides: the arguments of `python -m trainer`. `output_dir` defaults to a new folder in outputs/.
        show_log: print the run's log to `sys.stdout`.

    Raises:
        ConfigError: the configuration is invalid; no process was started.
        DataError: `data.root` is not a supported dataset; no process was started.
        CommandFailed: the run's exit code is not 0; the error's `exit_code` is this code.
        KeyboardInterrupt: the call was interrupted; the run has stopped.
    """
    config = load(*overrides)
    arguments = list(overrides)
    address = config.output_dir
    if address is None:
        address = str(create_output_folder(config.experiment_name))
        arguments.append(format_argument("output_dir", address))
    run_command("trainer", arguments, show_log)
    return open_run(address)
