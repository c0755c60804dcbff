"""The command line: Hydra composes, `config.load` validates, `train.run` trains."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from trainer.cluster.signals import StopFlag, end_at_once

if __name__ == "__main__":
    end_at_once()  # what is imported below takes seconds

from trainer.cli.process import be_seen, exit_with_code, quiet_start, speak_as, speak_early
from trainer.cli.sweep import compose_or_sweep
from trainer.cluster.discovery import discover
from trainer.cluster.rendezvous import meet
from trainer.config.diff import in_common
from trainer.config.schema import RunConfig, load, without_regularisation
from trainer.errors import INTERRUPTED, ConfigError
from trainer.monitoring import termination
from trainer.monitoring.health import signs
from trainer.monitoring.log import say
from trainer.runs.folder import follow_run_folder, is_finished, open_run_folder, source_digest, versions

LOOK_SECONDS = 15.0  # between two looks at the output folder while others are waited for


class _FinishedMeanwhile(Exception):
    """The others have ended well: nobody will come."""


def _look_around(config: RunConfig, stop: StopFlag) -> Callable[[], None]:
    """What a worker that waits for the others looks for: a signal, and that the run is finished."""
    looked = time.monotonic()

    def look() -> None:
        nonlocal looked
        stop.check("while waiting for the other workers")
        if time.monotonic() - looked > LOOK_SECONDS:
            looked = time.monotonic()
            if is_finished(config):
                raise _FinishedMeanwhile

    return look


def _say_finished(config: RunConfig) -> None:
    folder = config.output_dir
    say(text := f"{folder} is finished already (it holds DONE); its report is {folder}/report/index.html")
    termination.outcome(text)


def _train(arguments: list[str]) -> None:
    began = time.time()
    composed = compose_or_sweep(arguments)
    if composed is None:  # --help, --cfg or a finished sweep
        return
    config = load(composed)
    config = without_regularisation(config) if config.debug.overfit else config
    speak_as(config.runtime)
    cluster = discover(os.environ)
    be_seen(config, cluster.index, cluster.size)
    stop = StopFlag()
    if is_finished(config):
        return _say_finished(config)
    if cluster.size > 1 and not config.output_dir:
        raise ConfigError("several workers need output_dir=..., a folder that names the run and outlives its workers")
    signs.at("meeting the other workers")
    try:
        peers = meet(cluster, config.runtime.start_timeout, say, _look_around(config, stop))
    except _FinishedMeanwhile:
        return _say_finished(config)
    peers.on_stop = stop.told
    stop.on_signal = lambda name: peers.tell_stop(f"{name} on worker {peers.index}")
    # Until the run can be saved there is nothing to save: importing TensorFlow takes longer than some grace periods.
    stop.on_told = lambda reason: peers.end(
        INTERRUPTED, f"{reason} before training began; nothing is lost. Start the same command again to go on"
    )
    stop.check("before training began")
    with peers.together():
        peers.agree("configuration", in_common(config))
        peers.agree("code", versions() | {"source": source_digest()})
        home = open_run_folder(config, cluster.size) if peers.is_chief else follow_run_folder(config)
        signs.at("importing TensorFlow")
        with quiet_start():
            from trainer import train  # TensorFlow is imported only now: help and mistakes must answer at once

        train.run(config, home, peers, stop, began)
    peers.leave()


def main() -> None:
    """Entry point of `python -m trainer`; exits with a documented code (`trainer.errors`)."""
    with exit_with_code():
        speak_early(sys.argv[1:])
        _train(sys.argv[1:])


if __name__ == "__main__":
    main()
