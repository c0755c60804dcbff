"""The Python interface: train, evaluate and predict from a program or a notebook.

    from trainer import api

    result = api.train("experiment=photos", "data.root=photos", "output_dir=outputs/flowers")
    result.report["test"]["accuracy"]
    result.predict("new_photos").labels

Training and evaluation run `python -m trainer` and `python -m trainer.evaluate` in a process of their own, predictions
in this one. docs/api.md describes it. Errors are those of `trainer.errors`, and `CommandFailed`.
"""

from trainer.api.processes import CommandFailed, run_command
from trainer.api.result import Predictions, Report, Result, open_run
from trainer.cli.compose import compose, load_given
from trainer.cli.source import choose_source
from trainer.config.schema import RequestedConfig, apply_overfit
from trainer.config.typed import format_argument
from trainer.errors import ConfigError
from trainer.runs.folder import create_output_folder

__all__ = ["CommandFailed", "Predictions", "Report", "Result", "load", "open_run", "train"]


def load(*overrides: str) -> RequestedConfig:
    """Compose and validate the configuration of a run from arguments as those of `python -m trainer`; train nothing.

    Raises ConfigError with all faults.
    """
    if option := next((text for text in overrides if text.startswith("-")), None):
        raise ConfigError("is an option of the command line", key=option, fix="give KEY=VALUE or GROUP=NAME")
    arguments, _ = choose_source(list(overrides))
    composed = compose(arguments)
    assert composed is not None, "there are no options"
    return apply_overfit(load_given(composed, arguments))


def train(*overrides: str, show_log: bool = True) -> Result:
    """Train, resume or confirm the run that the arguments configure, in a process of its own, and wait for its end.

    It is one process on this machine: variables of the environment that describe several workers are not passed on.
    Ctrl-C, or the interruption of a notebook's cell, stops the run after a checkpoint; the same call resumes it.

    Args:
        overrides: as those of `python -m trainer`. Without `output_dir` a new folder below outputs/ is used.
        show_log: print the log of the run to `sys.stdout`.

    Raises:
        ConfigError: the configuration is wrong; no process was started.
        CommandFailed: the run ended with another exit code than 0, which it has as `exit_code`.
    """
    config, arguments = load(*overrides), list(overrides)
    address = config.output_dir
    if address is None:
        address = str(create_output_folder(config.experiment_name))
        arguments.append(format_argument("output_dir", address))
    run_command("trainer", arguments, show_log)
    return open_run(address)
