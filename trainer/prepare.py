"""`python -m trainer.prepare data=... output=FOLDER`: write sharded TFRecords, or with weights=... published weights.

    output=FOLDER        folder for the records, local or in a bucket
    data=..., KEY=VALUE  configuration as for training; used are data.*, seed, debug.max_examples and, of runtime,
                         cache_dir, disk_budget_gb, data_threads, progress, logging and health

    weights=[NAME,...]   write the ImageNet weights of these backbones instead, each as NAME or NAME:ALPHA; used are
                         runtime.progress, logging and health

Example: python -m trainer.prepare data=image_folder data.root=photos output=/data/photos
Weights: python -m trainer.prepare weights=[mobilenet_v2,mobilenet_v2:0.35,efficientnet_b0] output=gs://BUCKET/weights

The splits are written in TFDS's folder format: read them with `data=tfds data.root=FOLDER`, or with
`tfds.builder_from_directory`. Interrupted, the same command continues with the shards, or weights, that are missing.
Runs read the weights with `model.weights=FOLDER`, without internet.
"""

import os
import re
import signal
import sys

from trainer.cluster.signals import exit_on_sigterm

if __name__ == "__main__":
    exit_on_sigterm()  # SIGTERM and SIGINT end the process during the imports below, which take seconds

from trainer.cli.arguments import MATCH_ALL, format_usage, parse_arguments
from trainer.cli.compose import compose
from trainer.cli.overrides import list_argument_keys
from trainer.cli.process import (
    choose_and_log_source,
    configure_log,
    exit_with_code,
    start_monitoring,
    suppress_import_noise,
)
from trainer.config.schema import validate_config
from trainer.config.typed import format_argument
from trainer.config.unread import require_read
from trainer.data.prepare import parse_job_part, prepare
from trainer.errors import INTERRUPTED, ConfigError, format_count
from trainer.models.backbones import parse_backbones
from trainer.monitoring import termination
from trainer.monitoring.health import health
from trainer.monitoring.log import exit_at_once, log, log_unbuffered

USED_KEYS = re.compile(r"(data|runtime)\..+|seed|debug\.max_examples")  # keys that are read without weights=...
USED_KEYS_OF_WEIGHTS = re.compile(r"runtime\..+")  # keys that are read with weights=...


def _exit_on_signal(signum: int, _frame: object) -> None:
    """Exit immediately. Finished shards remain, so the same command continues."""
    reason = f"{signal.Signals(signum).name}; start the same command again to write what is missing"
    log_unbuffered(f"interrupted: {reason}")
    termination.write(INTERRUPTED, reason)
    exit_at_once(INTERRUPTED)


def main() -> None:
    """Run `python -m trainer.prepare`, and exit with a code of `trainer.errors`."""
    with exit_with_code():
        arguments, overrides = parse_arguments(
            sys.argv[1:], __doc__, {"output": "", "weights": ""}, other_arguments=MATCH_ALL
        )
        if "weights" not in arguments:
            overrides = choose_and_log_source(overrides)
        composed = compose(overrides)
        if composed is None:  # --cfg printed the configuration
            return
        if "output" not in arguments:
            raise ConfigError("is missing", key="output", fix=f"write {format_usage(__doc__)}")
        config = validate_config(composed)
        explicit_keys = list_argument_keys(overrides)
        # With every source, data.split_seed orders the records that are written.
        require_read(config, explicit_keys - {"data.split_seed", "data.shards"})
        used_keys, suffix = (USED_KEYS_OF_WEIGHTS, " weights=...") if "weights" in arguments else (USED_KEYS, "")
        if unread_keys := sorted(key for key in explicit_keys if not used_keys.fullmatch(key)):
            problem = f"is not read by trainer.prepare{suffix}"
            raise ConfigError.combine(ConfigError(problem, key=key, fix="remove it") for key in unread_keys)
        configure_log(config.runtime)
        job_part = parse_job_part(os.environ)
        start_monitoring(config, *job_part)
        signal.signal(signal.SIGTERM, _exit_on_signal)
        health.enter_phase("prepare")
        with suppress_import_noise():
            import tensorflow as tf  # decodes the images as training does
        tf.config.set_visible_devices([], "GPU")
        if "weights" in arguments:
            _write_weights(arguments["weights"], arguments["output"])
        else:
            prepare(config, arguments["output"], job_part)


def _write_weights(names: str, output: str) -> None:
    """Write the ImageNet weights of the backbones in `names`, the argument `weights`. Log how to train with them."""
    from trainer.models.weights_folder import prepare_weights  # imports TensorFlow

    with health.waiting_for("Keras, which downloads weights"):  # it reports no progress
        files = prepare_weights(parse_backbones(names, "weights"), output, log.info)
    file_count = format_count(len(files), "file")
    argument = format_argument("model.weights", output)
    outcome = f"{output} holds {file_count} of weights; train with them: {argument}"
    log.info(outcome)
    termination.set_success_message(outcome)


if __name__ == "__main__":
    main()
