"""`python -m trainer.evaluate run=OUTPUT_DIR [checkpoint=best|last|STEP] [split=test] [output=FOLDER] [data=...]`:
score a checkpoint of a run on a split, and write a report.

    checkpoint=best|last|STEP   the weights (default: those that the run exports at its end)
    split=train|validation|test the examples (default: test if the data has it, else validation, else train)
    output=FOLDER               folder of the report (default: <output_dir>/evaluations/<checkpoint>-<data>-<split>)

Example: python -m trainer.evaluate run=outputs/flowers data.root=new_photos split=train

The data is that of the run unless `data=...` or `data.KEY=...` changes it. Other data that has no splits is scored as a
whole unless `data.validation_fraction` or `data.test_fraction` is given, and can have only some of the classes.
`runtime...`, `training.batch_size` and `debug.max_examples` can be changed as well. Exit codes are those of a run.
"""

import re
import sys
from typing import Any

from trainer.cluster.signals import exit_on_sigterm

if __name__ == "__main__":
    exit_on_sigterm()  # the imports below take seconds

from trainer.cli.arguments import parse_arguments
from trainer.cli.compose import compose
from trainer.cli.process import configure_log, exit_with_code, suppress_import_noise
from trainer.config.schema import RunConfig, load_resolved
from trainer.config.unread import require_read
from trainer.errors import ConfigError
from trainer.monitoring.health import health
from trainer.runs.stored_run import StoredRun, load_checkpoint, read_run

# Key -> problem if it is missing, "" if it is optional.
ARGUMENTS = {"run": "is required", "checkpoint": "", "split": "", "output": ""}
CHANGEABLE = re.compile(r"(data|runtime)(\..+)?|training\.batch_size|debug\.max_examples")
FRACTIONS = ("validation_fraction", "test_fraction")


def apply_changes(run_config: dict[str, Any], changes: list[str]) -> tuple[RunConfig, RunConfig | None]:
    """Apply changes as `KEY=VALUE` or `GROUP=NAME` to `run_config`, the configuration of a run.

    Returns:
        The configuration of the evaluation, and None. If the changes choose another dataset and no fractions, the
        evaluation does not split it, and the second value is the configuration that splits it like the run's dataset.

    Raises:
        ConfigError: an argument is invalid, or changes a key that an evaluation cannot change.
    """
    keys = [change.split("=", 1)[0].lstrip("+") for change in changes]
    for key in keys:
        if not CHANGEABLE.fullmatch(key):
            fix = "change only data, runtime, training.batch_size and debug.max_examples"
            raise ConfigError("cannot be changed in an evaluation", key=key, fix=fix)
    composed = compose(changes)
    assert composed is not None, "no argument is one of Hydra's flags"
    if any(re.match(r"data\b", key) for key in keys):
        run_config["debug"]["overfit"] = False  # it applies only to the run's own dataset
    fractions = {key: run_config["data"][key] for key in FRACTIONS}
    for key in sorted(keys, key=lambda k: k.count(".")):  # a group precedes the values in it
        old, new = run_config, composed
        *parents, name = key.split(".")
        for parent in parents:
            old, new = old[parent], new[parent]
        old[name] = new[name]
    config = load_resolved(run_config)
    require_read(config, keys)
    if {f"data.{key}" for key in FRACTIONS} & set(keys) or not {"data", "data.root", "data.pattern"} & set(keys):
        return config, None
    moved = load_resolved(run_config | {"data": run_config["data"] | fractions})
    return load_resolved(run_config | {"data": run_config["data"] | dict.fromkeys(FRACTIONS, 0.0)}), moved


def main() -> None:
    """Run `python -m trainer.evaluate`, and exit with a code of `trainer.errors`."""
    with exit_with_code():
        options, changes = parse_arguments(sys.argv[1:], __doc__, ARGUMENTS, rest=r"[^-~].*=(?s:.*)")
        home, run_config, run_json = read_run(options["run"])
        config, moved = apply_changes(run_config, changes)
        configure_log(config.runtime)
        run = StoredRun(options["run"], home, config, tuple(run_json["classes"]), run_json["data_fingerprint"])
        checkpoint = load_checkpoint(run, options.get("checkpoint"))
        health.enter_phase("evaluate")
        with suppress_import_noise():
            from trainer.report.evaluate_run import evaluate  # here, because it imports TensorFlow
        evaluate(run, checkpoint, options, moved)


if __name__ == "__main__":
    main()
