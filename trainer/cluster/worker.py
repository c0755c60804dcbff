"""One worker of a run: its control channel, devices and stop flag."""

from dataclasses import dataclass

import tensorflow as tf

from trainer.cluster.control import ControlChannel
from trainer.cluster.signals import StopFlag
from trainer.monitoring.health import health


@dataclass(frozen=True)
class Worker:
    """One worker of a run. Only the chief, worker 0, writes to the folder of the run."""

    control: ControlChannel
    strategy: tf.distribute.Strategy
    stop: StopFlag

    @property
    def index(self) -> int:
        """The index of this worker; 0 is the chief."""
        return self.control.index

    @property
    def size(self) -> int:
        """The number of workers."""
        return self.control.size

    @property
    def is_chief(self) -> bool:
        return self.control.is_chief

    @property
    def replicas(self) -> int:
        """The number of replicas on this worker."""
        return self.strategy.num_replicas_in_sync // self.size

    def stop_requested(self) -> bool:
        """Record progress, and return whether this worker has a stop request. The compiled step calls this."""
        health.record_progress()
        return self.stop.reason is not None

    def should_stop(self, when: str) -> bool:
        """Return whether any worker has a stop request. All workers must call this at the same point."""
        return self.control.any_worker(f"stop {when}", self.stop.reason is not None)
