"""`python -m trainer`: train or resume the run that the arguments configure.

Hydra composes the configuration, `config.schema.validate_config` validates it, and `train.train_run` trains.
"""

import os
import sys
import time
from contextlib import nullcontext

from trainer.cluster.signals import StopFlag, exit_on_sigterm

if __name__ == "__main__":
    exit_on_sigterm()  # SIGTERM and SIGINT end the process during the imports below, which take seconds

from trainer.cli.compose import load_and_require_read, requests_sweep
from trainer.cli.process import (
    RestartProcess,
    choose_and_log_source,
    configure_log,
    exit_with_code,
    make_log_labels,
    start_monitoring,
    suppress_import_noise,
)
from trainer.cli.sweep import compose_or_sweep, select_job
from trainer.cluster import watchdog
from trainer.cluster.compilation_cache import set_compilation_cache
from trainer.cluster.discovery import discover
from trainer.cluster.rendezvous import rendezvous
from trainer.config.diff import select_common_settings
from trainer.config.schema import apply_overfit
from trainer.config.typed import quote_if_needed
from trainer.distillation.own_teacher import choose_teacher_or_student, rename_teacher_keys
from trainer.errors import INTERRUPTED
from trainer.monitoring import termination
from trainer.monitoring.health import health
from trainer.monitoring.log import log
from trainer.runs.folder import (
    Finished,
    collect_versions,
    hash_source,
    make_worker_run_folder,
    open_run_folder,
    require_output_dir,
    require_unfinished,
)
from trainer.storage.disk import translate_file_errors

DONE_CHECK_INTERVAL_SECONDS = 15.0  # time between checks for DONE while a worker waits for the others


def main() -> None:
    """Run `python -m trainer`, and exit with a code of `trainer.errors`."""
    with exit_with_code():
        process_started, environment_at_start = time.time(), dict(os.environ)
        arguments, environment = select_job(choose_and_log_source(sys.argv[1:]), os.environ)
        composed = compose_or_sweep(arguments)
        if composed is None:  # --help, --cfg or a finished sweep
            return
        config = apply_overfit(load_and_require_read(composed, arguments))
        configure_log(config.runtime)
        cluster = discover(environment)
        listener = start_monitoring(config, cluster.index, cluster.size)
        stop = StopFlag()
        last_check = time.monotonic()

        def check_cancelled() -> None:
            """Raise StopRequested after a stop request, or `Finished` if the run is finished."""
            nonlocal last_check
            stop.check("while waiting for the other workers")
            if time.monotonic() - last_check > DONE_CHECK_INTERVAL_SECONDS:
                last_check = time.monotonic()
                require_unfinished(config)

        try:
            require_unfinished(config)
            require_output_dir(config, cluster.size)
            health.set_activity("waiting for the other workers")
            control = rendezvous(cluster, config.runtime.start_timeout, log.info, check_cancelled)
        except Finished as finished:
            log.info(str(finished))
            return termination.set_success_message(str(finished))
        control.on_stop = stop.request
        stop.on_signal = lambda name: control.broadcast_stop(f"{name} on worker {control.index}")
        # End immediately: nothing needs to be saved yet, and importing TensorFlow can take longer than a grace period.
        stop.on_request = lambda reason: control.end(
            INTERRUPTED, f"{reason} before training began, nothing is lost; start the same command again to resume"
        )
        stop.check("before training began")
        with control.propagate_failures(), translate_file_errors():
            control.require_equal("configuration", select_common_settings(config))
            control.require_equal("code", collect_versions() | {"source": hash_source()})
            config, teacher = choose_teacher_or_student(config, control)
            run_config = teacher or config  # the run that this start trains
            with rename_teacher_keys() if teacher else nullcontext():
                folder = open_run_folder(run_config) if control.is_chief else make_worker_run_folder(run_config)
            folder.student_output_dir = config.output_dir if teacher else None
            control.on_end = lambda code, reason: folder.record_exit(code, reason, stopped=stop.reason is not None)
            watchdog.start(config.runtime, control, stop.unread, listener, **make_log_labels(config, cluster.index))
            health.set_activity("importing TensorFlow")
            chief_folder = folder.path if control.is_chief else None
            set_compilation_cache(config.runtime.cache_folder, chief_folder, config.runtime.deterministic)
            with suppress_import_noise():
                from trainer.train import train_run  # here, so that --help and errors do not wait for TensorFlow

            with rename_teacher_keys() if teacher else nullcontext():
                train_run(run_config, folder, control, stop, process_started)
        control.disconnect()
        if teacher:
            stop.check("between the teacher and its student")
            log.info("teacher: finished; starting the run of its student")
            watchdog.stop()
            # The student needs the folder that this start has chosen, unless the command already has it.
            folder_argument = f"output_dir={quote_if_needed(config.output_dir)}"
            has_folder = folder_argument in sys.argv or requests_sweep(sys.argv)
            raise RestartProcess([] if has_folder else [folder_argument], environment_at_start, stop.has_request)


if __name__ == "__main__":
    main()
