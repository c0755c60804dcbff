"""This process as a worker of a run: its control channel, distribution strategy and stop flag."""

from dataclasses import dataclass

import tensorflow as tf

from trainer.cluster.control import ControlChannel
from trainer.cluster.signals import StopFlag
from trainer.monitoring.health import health


@dataclass(frozen=True)
class Worker:
    """This process as a worker of a run. Only the chief, worker 0, writes to the run's folder."""

    control: ControlChannel
    strategy: tf.distribute.Strategy
    stop: StopFlag

    @property
    def index(self) -> int:
        """Index of this worker; 0 is the chief."""
        return self.control.index

    @property
    def size(self) -> int:
        """Number of workers."""
        return self.control.size

    @property
    def is_chief(self) -> bool:
        """Whether this is worker 0."""
        return self.control.is_chief

    @property
    def replicas(self) -> int:
        """Number of replicas (devices) on this worker."""
        return self.strategy.num_replicas_in_sync // self.size

    def stop_requested(self) -> bool:
        """Record progress, and return whether this worker has a stop request.

        The compiled training step calls this in a TensorFlow thread.
        """
        health.record_progress()
        return self.stop.reason is not None

    def should_stop(self, when: str) -> bool:
        """Return whether any worker has a stop request; the result is the same on all workers.

        All workers must call this at the same point of the run, with the same `when`, which names that point.
        """
        return self.control.any_worker(f"stop {when}", self.stop.reason is not None)
