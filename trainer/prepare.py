"""`python -m trainer.prepare data=... output=FOLDER`: write sharded TFRecords.

    output=FOLDER        folder of the records, local or gs://
    data=..., KEY=VALUE  as of a run; data.*, seed, debug.max_examples, runtime.cache_dir and .progress matter

The splits are in TFDS's folder format: read them with `data=tfds data.root=FOLDER`, or with
`tfds.builder_from_directory`.
"""

import os
import signal
import sys

from trainer.cluster.signals import exit_on_sigterm

if __name__ == "__main__":
    exit_on_sigterm()  # the imports below take seconds

from trainer.cli.arguments import ALL, read_arguments, usage
from trainer.cli.compose import compose
from trainer.cli.process import configure_log, exit_with_code, start_monitoring
from trainer.config.schema import load
from trainer.data.prepare import part_of_job, prepare
from trainer.errors import INTERRUPTED, ConfigError
from trainer.monitoring import termination
from trainer.monitoring.health import health
from trainer.monitoring.log import log_unbuffered


def _end(number: int, _frame: object) -> None:
    """Exit on a signal: finished shards stay, and the processes that write others end with this one."""
    reason = f"{signal.Signals(number).name}; start the same command again to write what is missing"
    log_unbuffered(f"interrupted: {reason}")
    termination.write(INTERRUPTED, reason)
    os._exit(INTERRUPTED)


def main() -> None:
    """Entry point of `python -m trainer.prepare`; exits with a documented code (`trainer.errors`)."""
    with exit_with_code():
        own, rest = read_arguments(sys.argv[1:], __doc__, {"output": ""}, rest=ALL)
        composed = compose(rest)
        if composed is None:  # --cfg
            return
        if "output" not in own:
            raise ConfigError("is missing", key="output", fix=f"write {usage(__doc__)}")
        config = load(composed)
        configure_log(config.runtime)
        part = part_of_job(os.environ)
        start_monitoring(config, *part)
        signal.signal(signal.SIGTERM, _end)
        health.enter_phase("prepare")
        prepare(config, own["output"], part)


if __name__ == "__main__":
    main()
