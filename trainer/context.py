"""The objects of a run on one worker, and the record of how the run failed or was stopped."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import tensorflow as tf

from trainer.cluster.control import HEARTBEAT_INTERVAL_SECONDS, HEARTBEAT_TIMEOUT_SECONDS
from trainer.cluster.signals import end_without_progress
from trainer.cluster.worker import Worker
from trainer.config.schema import RunConfig
from trainer.config.typed import format_argument
from trainer.data.images import ImageStore
from trainer.data.sharding import ShardingPlan
from trainer.distillation.teacher import OpenedTeacher
from trainer.errors import BUG, INTERRUPTED, DataError, Interrupted, TrainerError
from trainer.evaluation.scoring import Scorer
from trainer.features.plan import FeaturePlan
from trainer.models.classifier import Classifier
from trainer.monitoring.health import health
from trainer.runs.clock import Clock
from trainer.runs.folder import RunFolder
from trainer.runs.metrics import MetricsWriter
from trainer.runs.restarts import STOPPED
from trainer.runs.saver import Saver
from trainer.storage.disk import translate_disk_errors
from trainer.training.state import RunState


@dataclass
class RunPlan:
    """The decisions that each start makes before its first step."""

    features: FeaturePlan
    sharding: ShardingPlan
    teacher: OpenedTeacher | None


@dataclass
class RunContext:
    """The objects of a run on one worker. `train.make_plan` sets `plan` and `scorer`."""

    config: RunConfig
    worker: Worker
    images: ImageStore
    classifier: Classifier
    state: RunState
    saver: Saver
    clock: Clock
    metrics: MetricsWriter
    plan: RunPlan = field(init=False)
    scorer: Scorer = field(init=False)


@contextmanager
def advise_export(run: str) -> Iterator[None]:
    """Add to an error about the data, after the training of a run at this address, how its weights are exported."""
    try:
        yield
    except DataError as error:
        command = f"python -m trainer.export {format_argument('run', run)} data.on_error=skip"
        trained = "this run, which is trained, accepts no other data"
        error.fix = f"{error.fix or 'repair the data'}; {trained}: then export it with {command}"
        raise


@contextmanager
def record_failures(run: RunContext, folder: RunFolder) -> Iterator[None]:
    """Record the reason and the time breakdown if the run fails or is stopped, and close its files in any case.

    Before the folder has `begun`, only the end of this start is recorded. An `OSError`, and any error of a full disk,
    becomes `Interrupted`, because a restart might succeed. A TensorFlow error of one of several workers is re-raised
    only after the heartbeat timeout. Its cause can be a lost peer, for which the control channel ends the process with
    exit code 75. Exceptions other than these and `TrainerError` are not recorded.
    """
    control, stop, saver = run.worker.control, run.worker.stop, run.saver

    def record(code: int, reason: str) -> None:
        if folder.begun:
            saver.restarts.record_failure(code, reason)
            with suppress(OSError):  # probably the recorded error again
                run.clock.write()
        else:
            folder.record_exit(code, reason, stopped=stop.reason is not None)

    def on_request(reason: str) -> None:
        """Record a stop request; end a stalled process at once, because it would not reach the next step."""
        if stalled := health.stall_reason():
            control.end(INTERRUPTED, f"{reason} while {stalled}; checkpoints are intact; {saver.resume_hint}")
        saver.restarts.end(STOPPED, reason)  # in case the process is killed before it has saved
        timed_out = f"{reason}, but the current step did not end in time; checkpoints are intact; {saver.resume_hint}"
        end_without_progress(control.end, timed_out)

    control.on_end, stop.on_request = record, on_request
    folders = saver.path, run.config.runtime.cache_folder
    try:
        with translate_disk_errors(folders, "checkpoints are intact", f"make space there. {saver.resume_hint}"):
            yield
    except OSError as error:
        problem = f"{saver.address}: {error.strerror or error}; checkpoints are intact"
        interrupted = Interrupted(problem, fix=saver.resume_hint)
        record(INTERRUPTED, str(interrupted))
        raise interrupted from error
    except tf.errors.OpError as error:
        if control.size > 1:  # perhaps a failed collective
            time.sleep(HEARTBEAT_TIMEOUT_SECONDS + 2 * HEARTBEAT_INTERVAL_SECONDS)
        record(BUG, str(error))
        raise
    except TrainerError as error:
        record(error.exit_code, str(error))
        raise
    finally:
        run.metrics.close()
        saver.publisher.close()
        run.images.close()
        if not folder.begun:
            folder.abandon(sys.exception())
