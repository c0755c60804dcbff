"""One worker of a run: its control channel, devices and stop flag."""

from dataclasses import dataclass

import tensorflow as tf

from trainer.cluster.control import ControlChannel
from trainer.cluster.signals import StopFlag
from trainer.monitoring.health import health


@dataclass(frozen=True)
class Worker:
    """One worker of a run; the chief, worker 0, alone writes into the run's folder."""

    control: ControlChannel
    strategy: tf.distribute.Strategy
    stop: StopFlag

    @property
    def index(self) -> int:
        """Number of this worker, from 0."""
        return self.control.index

    @property
    def size(self) -> int:
        return self.control.size

    @property
    def is_chief(self) -> bool:
        return self.control.is_chief

    @property
    def replicas(self) -> int:
        """Replicas on this worker."""
        return self.strategy.num_replicas_in_sync // self.size

    def stop_requested(self) -> bool:
        """Return whether this worker has a stop request. The compiled step calls this: each step counts as progress."""
        health.progress()
        return self.stop.reason is not None

    def should_stop(self, where: str) -> bool:
        """Return whether any worker has a stop request; all workers must call this at the same point."""
        return self.control.any_worker(f"stop {where}", self.stop.reason is not None)
