"""`python -m trainer.evaluate run=OUTPUT_DIR [checkpoint=best|last|STEP] [split=test] [output=FOLDER] [data=...]`:
score a checkpoint of a run, and write the report.

    checkpoint=best|last|STEP   which weights (default: those that the run exported)
    split=train|validation|test which examples (default: test if the data has it, else validation, else train)
    output=FOLDER               where to write (default: <output_dir>/evaluations/<checkpoint>-<data>-<split>)

The data is that of the run, or that of `data=...` and `data.KEY=...`; `runtime...`, `training.batch_size` and
`debug.max_examples` can be changed as well. Exit codes are those of a run.
"""

import re
import sys
from typing import Any

from trainer.cluster.signals import exit_on_sigterm

if __name__ == "__main__":
    exit_on_sigterm()  # the imports below take seconds

from trainer.cli.arguments import read_arguments
from trainer.cli.compose import compose
from trainer.cli.process import configure_log, exit_with_code, quiet_start
from trainer.config.schema import RunConfig, load_resolved
from trainer.errors import ConfigError
from trainer.monitoring.health import health
from trainer.runs.finished_run import FinishedRun, load_checkpoint, read_run

OWN = {"run": "give once the run to evaluate", "checkpoint": "", "split": "", "output": ""}
FREE = re.compile(r"(data|runtime)(\..+)?|training\.batch_size|debug\.max_examples")


def configuration(tree: dict[str, Any], arguments: list[str]) -> RunConfig:
    """Return the run's configuration with the changes of the arguments.

    Raises:
        ConfigError: an argument is wrong or would change the model.
    """
    keys = [a.split("=", 1)[0].lstrip("+") for a in arguments]
    for key in keys:
        if not FREE.fullmatch(key):
            raise ConfigError(
                "cannot be changed in an evaluation",
                key=key,
                fix="change only data, runtime, training.batch_size and debug.max_examples",
            )
    composed = compose(arguments)
    assert composed is not None, "no argument is one of Hydra's flags"
    if any(re.match(r"data\b", key) for key in keys):
        tree["debug"]["overfit"] = False  # it applied to the data of the run
    for key in sorted(keys, key=lambda k: k.count(".")):  # a group before the values in it
        old, new = tree, composed
        *path, last = key.split(".")
        for part in path:
            old, new = old[part], new[part]
        old[last] = new[last]
    return load_resolved(tree)


def main() -> None:
    """Entry point of `python -m trainer.evaluate`; exits with a documented code (`trainer.errors`)."""
    with exit_with_code():
        own, rest = read_arguments(sys.argv[1:], __doc__, OWN, rest=r"[^-~].*=(?s:.*)")
        home, tree, facts = read_run(own["run"])
        config = configuration(tree, rest)
        configure_log(config.runtime)
        run = FinishedRun(own["run"], home, config, tuple(facts["classes"]), facts["data_fingerprint"])
        checkpoint = load_checkpoint(run, own.get("checkpoint"))
        health.enter_phase("evaluate")
        with quiet_start():
            from trainer.report.evaluate_run import evaluate  # TensorFlow, after all arguments have been checked
        evaluate(run, checkpoint, own)


if __name__ == "__main__":
    main()
