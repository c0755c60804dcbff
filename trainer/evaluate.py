"""`python -m trainer.evaluate run=OUTPUT_DIR [checkpoint=best|last|STEP] [split=test] [output=FOLDER] [data=...]`:
score a checkpoint of a run, and write the report on it.

    checkpoint=best|last|STEP   which weights; what the run exported where it is left out
    split=train|validation|test which examples; test where the data has it, else validation, else train
    output=FOLDER               where to; <output_dir>/evaluations/<checkpoint>-<data>-<split> where it is left out

The data is the run's own, or what `data=...` and `data.KEY=...` say; `runtime...`, `training.batch_size` and
`debug.max_examples` may be changed as well. Exit codes are those of a run.
"""

import re
import sys
from typing import Any

from trainer.cluster.signals import end_at_once

if __name__ == "__main__":
    end_at_once()  # what is imported below takes seconds

from trainer.cli.arguments import read_arguments
from trainer.cli.compose import compose
from trainer.cli.process import configure_log, exit_with_code, quiet_start
from trainer.config.schema import RunConfig, load_resolved
from trainer.errors import ConfigError
from trainer.monitoring.health import health
from trainer.runs.finished_run import FinishedRun, load_checkpoint, read_run

OWN = {"run": "say once what to evaluate", "checkpoint": "", "split": "", "output": ""}
FREE = re.compile(r"(data|runtime)(\..+)?|training\.batch_size|debug\.max_examples")


def configuration(tree: dict[str, Any], arguments: list[str]) -> RunConfig:
    """The run's configuration with the changes that the arguments ask for.

    Raises:
        ConfigError: an argument would change the model, or is wrong.
    """
    keys = [a.split("=", 1)[0].lstrip("+") for a in arguments]
    for key in keys:
        if not FREE.fullmatch(key):
            raise ConfigError(
                f"{key}: an evaluation takes the model as it is; only data, runtime, training.batch_size and "
                "debug.max_examples can be changed"
            )
    composed = compose(arguments)
    assert composed is not None, "no argument asks Hydra itself"
    if any(re.match(r"data\b", key) for key in keys):
        tree["debug"]["overfit"] = False  # of the data that was overfitted
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
            from trainer.report.evaluate_run import evaluate  # TensorFlow only now: mistakes must answer at once
        evaluate(run, checkpoint, own)


if __name__ == "__main__":
    main()
