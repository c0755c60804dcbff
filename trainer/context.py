"""Run context: the objects that one training process holds."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import tensorflow as tf

from trainer.cluster.control import HEARTBEAT_INTERVAL, HEARTBEAT_TIMEOUT
from trainer.cluster.worker import Worker
from trainer.config.schema import RunConfig
from trainer.data.images import ImageStore
from trainer.data.sharding import ShardingPlan
from trainer.distillation.teacher import OpenedTeacher
from trainer.errors import BUG, INTERRUPTED, Interrupted, TrainerError
from trainer.evaluation.scoring import Scorer
from trainer.features.plan import FeaturePlan
from trainer.models.classifier import Classifier
from trainer.monitoring.health import health
from trainer.runs.clock import Clock
from trainer.runs.metrics import MetricsWriter
from trainer.runs.restarts import STOPPED
from trainer.runs.saver import Saver
from trainer.training.state import RunState


@dataclass
class RunPlan:
    """Decisions made before the first step."""

    features: FeaturePlan
    sharding: ShardingPlan
    teacher: OpenedTeacher | None


@dataclass
class RunContext:
    """One run as one worker sees it; `plan` and `scorer` are set once the run is restored."""

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
def failures_recorded(run: RunContext) -> Iterator[None]:
    """Record the time and the reason of the end of a run, however it ends, and close its files."""
    control, stop, saver = run.worker.control, run.worker.stop, run.saver

    def ended(code: int, reason: str) -> None:
        saver.restarts.failed(code, reason)
        run.clock.write()

    def stop_requested(reason: str) -> None:
        """A process that is stuck ends here: the step that could save will not come."""
        if stalled := health.stall_reason():
            control.end(INTERRUPTED, f"{reason} while {stalled}; what was saved before is intact. {saver.resume_hint}")
        saver.restarts.end(STOPPED, reason)  # should the time to stop not suffice

    control.on_end, stop.on_request = ended, stop_requested
    try:
        yield
    except OSError as error:
        text = f"{saver.address}: {error.strerror or error}; what was saved before is intact. {saver.resume_hint}"
        ended(Interrupted.exit_code, text)
        raise Interrupted(text) from error
    except tf.errors.OpError as error:
        if control.size > 1:  # a collective that failed: the control channel soon says whose fault it is
            time.sleep(HEARTBEAT_TIMEOUT + 2 * HEARTBEAT_INTERVAL)
        ended(BUG, str(error))
        raise
    except TrainerError as error:
        ended(error.exit_code, str(error))
        raise
    finally:
        run.metrics.close()
        saver.publisher.close()
        run.images.close()
