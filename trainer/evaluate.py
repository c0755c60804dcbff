"""`python -m trainer.evaluate run=OUTPUT_DIR [checkpoint=best|last|STEP] [split=test] [output=FOLDER] [data=...]`:
score a checkpoint of a run on a split, and write a report.

    checkpoint=best|last|STEP   the weights (default: those that the run exports at its end), or a phase that has ended
    split=train|validation|test the examples (default: test if the data has it, else validation, else train)
    output=FOLDER               folder of the report (default: <output_dir>/evaluations/<checkpoint>-<data>-<split>)

Example: python -m trainer.evaluate run=outputs/flowers data.root=new_photos split=train

The dataset is that of the run unless `data=...` or `data.KEY=...` changes it. All of another dataset is scored: limits
and corrections of the run (`data.validation_fraction`, `data.test_fraction`, `data.labels_per_class`,
`data.corrections`, `debug.max_examples`) apply to it only if they are given here too. It can have only some of the
classes of the run. `runtime...` and `training.batch_size` can be changed as well. Exit codes are those of a run.
"""

import re
import sys
from typing import Any

from trainer.cluster.signals import exit_on_sigterm

if __name__ == "__main__":
    exit_on_sigterm()  # SIGTERM and SIGINT end the process during the imports below, which take seconds

from trainer.cli.arguments import parse_arguments
from trainer.cli.compose import compose
from trainer.cli.process import configure_log, exit_with_code, suppress_import_noise
from trainer.cli.source import choose_source
from trainer.config.keys import list_keys, suggest_key
from trainer.config.schema import RunConfig, validate_resolved_config
from trainer.config.unread import require_read
from trainer.errors import ConfigError
from trainer.monitoring.health import health
from trainer.monitoring.log import log
from trainer.runs.stored_run import StoredRun, load_checkpoint, read_run

# Argument -> problem that is reported if it is missing, or "" if it is optional.
ARGUMENTS = {"run": "is required", "checkpoint": "", "split": "", "output": ""}
# Keys and config groups in the run's configuration that an evaluation can change.
CHANGEABLE_KEYS = re.compile(r"(data|runtime)(\..+)?|training\.batch_size|debug\.max_examples")
FRACTIONS = {"validation_fraction", "test_fraction"}
# Keys of `data` that select or correct examples -> the value that uses all examples without corrections.
ALL_EXAMPLES: dict[str, float | None] = dict.fromkeys(FRACTIONS, 0.0) | {"labels_per_class": None, "corrections": None}
# Keys and config groups that choose another dataset than the run's.
DATASET_KEYS = {"data", "data.root", "data.name", "data.data_dir", "data.pattern"}


def apply_changes(run_config: dict[str, Any], changes: list[str]) -> tuple[RunConfig, RunConfig | None]:
    """Apply changes to a run's configuration, to evaluate the run.

    Args:
        run_config: the run's config.yaml as a mapping; it is modified.
        changes: arguments such as "data.root=photos" or "data=tfds".

    Returns:
        The evaluation's configuration, and None unless the changes choose another dataset. All of another dataset is
        evaluated: the run's fractions, limits and corrections do not apply unless they are among the changes. The
        second value is then the same configuration with the run's fractions, limits and corrections, in case the
        dataset is a moved copy of the run's dataset. It is None if the changes set a fraction.

    Raises:
        ConfigError: a change is invalid, or its key cannot be changed in an evaluation.
    """
    keys = [change.split("=", 1)[0].lstrip("+") for change in changes]
    for key in keys:
        if not CHANGEABLE_KEYS.fullmatch(key):
            suggestion = suggest_key(key, [name for name in list_keys(RunConfig) if CHANGEABLE_KEYS.fullmatch(name)])
            fix = "change only data, runtime, training.batch_size and debug.max_examples"
            fix = suggestion if suggestion.startswith("did") else fix
            raise ConfigError("cannot be changed in an evaluation", key=key, fix=fix)
    composed = compose(changes)
    assert composed is not None, "no argument is one of Hydra's flags"
    if any(re.match(r"data\b", key) for key in keys):
        run_config["debug"]["overfit"] = False  # True would evaluate only the batch that the run trained on
    run_data = dict(run_config["data"])
    for key in sorted(keys, key=lambda k: k.count(".")):  # a group is applied before the keys in it
        target_section, source_section = run_config, composed
        *parents, name = key.split(".")
        for parent in parents:
            target_section, source_section = target_section[parent], source_section[parent]
        target_section[name] = source_section[name]
    if "data" in keys and "data.orientation" not in keys:
        # The orientation is part of the preprocessing that the model was trained with.
        run_config["data"]["orientation"] = run_data.get("orientation", "ignore")
    if "data" in keys and "data.class_prefix" not in keys:  # so that its classes match the model's classes
        run_config["data"]["class_prefix"] = run_data.get("class_prefix")
    if "data" in keys and "data.class_names" not in keys and isinstance(run_data.get("class_names"), dict):
        run_config["data"]["class_names"] = run_data["class_names"]
    config = validate_resolved_config(run_config)
    require_read(config, keys)
    if not DATASET_KEYS & set(keys):
        return config, None
    limits = {key: value for key, value in ALL_EXAMPLES.items() if f"data.{key}" not in keys}
    run_limits = {key: run_data[key] for key in limits if key in run_data}
    moved_config: RunConfig | None = validate_resolved_config(run_config | {"data": run_config["data"] | run_limits})
    if not limits.keys() >= FRACTIONS:  # the changes set a fraction; the other fraction remains the run's
        moved_config = None
        limits = {key: value for key, value in limits.items() if key not in FRACTIONS}
    debug = run_config["debug"] | ({} if "debug.max_examples" in keys else {"max_examples": None})
    return validate_resolved_config(run_config | {"data": run_config["data"] | limits, "debug": debug}), moved_config


def choose_other_source(changes: list[str], source: str) -> tuple[list[str], str]:
    """Prepend `data=SOURCE` to the changes if their dataset has another source than the run, whose source is `source`.

    Returns:
        The changes, and a log line with the choice and its reason; "" if the source is the run's source.
    """
    with_source, log_line = choose_source(changes)
    return (with_source[1:], "") if log_line and with_source[0] == f"data={source}" else (with_source, log_line)


def main() -> None:
    """Run `python -m trainer.evaluate`, and exit with a code of `trainer.errors`."""
    with exit_with_code():
        options, changes = parse_arguments(sys.argv[1:], __doc__, ARGUMENTS, other_arguments=r"[^-~].*=(?s:.*)")
        folder, run_config, run_json = read_run(options["run"])
        changes, log_line = choose_other_source(changes, run_config["data"]["source"])
        config, moved_config = apply_changes(run_config, changes)
        configure_log(config.runtime)
        if log_line:
            log.info(log_line)
        run = StoredRun(options["run"], folder, config, tuple(run_json["classes"]), run_json["data_fingerprint"])
        checkpoint = load_checkpoint(run, options.get("checkpoint"))
        health.enter_phase("evaluate")
        with suppress_import_noise():
            from trainer.report.evaluate_run import evaluate  # here, because it imports TensorFlow
        evaluate(run, checkpoint, options, moved_config)


if __name__ == "__main__":
    main()
