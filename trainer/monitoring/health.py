"""Health of this process for `/healthz`, `/metrics` and the log: its activity, last progress and gauges.

The main thread sets the activity. Any thread can record progress or read the health. There is no lock, because single
reads and writes of attributes are atomic under the GIL. A reader can see some values from before a change, and others
from after it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

START, FINISH = "start", "finish"  # values of `Health.phase` before and after the training phases


class Health:
    """The activity, last progress and gauges of a process."""

    def __init__(self) -> None:
        self.phase = START  # START, the name of the current training phase, FINISH, or the name of another command
        self.activity = "starting"  # what the main thread is doing, in a few words
        self.stuck_after = float("inf")  # seconds without progress that count as a stall (`runtime.stuck_after`)
        # Called by `set_activity`, and by `trainer.cluster.control` when the watched peers change.
        # `trainer.cluster.watchdog` sets it to a function that sends the state to the watchdog process.
        self.on_change: Callable[[], None] = lambda: None
        self.values: dict[str, float] = {}  # gauges set so far, by name: step, epoch, loss, ...
        self.work = (0, 0)  # completed and total units of the activity; the total is 0 if it is unknown
        # Completed units at the first count of the current loop, and time.monotonic() of that count.
        self.first_work_count = (0, 0.0)
        self.activity_started_at = self._last_progress = time.monotonic()
        self._last_step: float | None = None
        self._saved: float | None = None
        self._waiting_for: str | None = None
        self._blocked_timeout: float | None = None

    def enter_phase(self, phase: str) -> None:
        """Set the run's phase, and use its name as the activity."""
        self.phase = phase
        self.set_activity(phase)

    def set_activity(self, activity: str) -> None:
        """Set the main thread's activity. This counts as progress."""
        if activity != self.activity:
            self.activity, self.work, self.activity_started_at = activity, (0, 0), time.monotonic()
        self.record_progress()
        self.on_change()

    def record_progress(self, done: int = 0, total: int = 0) -> None:
        """Record progress, such as a step, a batch, a part of a file, or an iteration of a polling loop.

        An activity can run several loops in sequence, each with its own units. A different `total` or a smaller `done`
        marks a new loop.

        Args:
            done: number of completed units of the current loop.
            total: number of all units of the loop; 0 if it is unknown.
        """
        self._last_progress = time.monotonic()
        if total:
            if total != self.work[1] or done < self.work[0]:
                self.first_work_count = (done, self._last_progress)
            self.work = (done, total)

    def seconds_left(self, now: float) -> float | None:
        """Estimate the seconds until all units of the current loop are completed.

        `now` is the current time.monotonic(). Returns None if no unit was completed since the first count of the loop.
        """
        (done, total), (first_done, first_counted_at) = self.work, self.first_work_count
        return (now - first_counted_at) / (done - first_done) * (total - done) if done > first_done else None

    def record_steps(self, step: int, epoch: int) -> None:
        """Record that the run has taken `step` optimizer steps and is in `epoch`, counted from 1."""
        self.record_progress()
        self._last_step = self._last_progress
        self.set_gauges(step=step, epoch=epoch)

    def record_checkpoint(self, seconds_ago: float = 0.0) -> None:
        """Record a checkpoint of the state `seconds_ago` seconds ago, or that training starts, with nothing to lose."""
        self._saved = time.monotonic() - seconds_ago

    def set_gauges(self, **values: float) -> None:
        """Set gauges for `/metrics` and the log, such as `loss=0.5`. `trainer.monitoring.http.GAUGES` has the names."""
        self.values |= values

    @contextmanager
    def waiting_for(self, target: str) -> Iterator[None]:
        """Disable stall detection in this block, in which the main thread waits for `target`.

        `target` describes a peer, or a library that reports no progress. Blocks cannot be nested.
        """
        self._waiting_for = target
        try:
            yield
        finally:
            self._waiting_for = None
            self.record_progress()

    @contextmanager
    def blocked_in(self, activity: str, timeout: float) -> Iterator[None]:
        """Set the activity in this block, which calls a function that can hold the GIL, so that no Python code runs.

        Meanwhile, the watchdog ends the process only if it is unresponsive for `timeout` seconds. Blocks cannot be
        nested.
        """
        outer_activity, self._blocked_timeout = self.activity, timeout
        self.set_activity(activity)
        try:
            yield
        finally:
            self._blocked_timeout = None
            self.set_activity(outer_activity)

    @property
    def unresponsive_timeout(self) -> float:
        """Seconds without running Python code after which the watchdog ends this process."""
        return self.stuck_after if self._blocked_timeout is None else self._blocked_timeout

    @property
    def seconds_since_progress(self) -> float:
        """Seconds since the last progress; 0 in a `waiting_for` block."""
        return 0.0 if self._waiting_for else time.monotonic() - self._last_progress

    @property
    def step_age(self) -> float | None:
        """Seconds since this process completed its last step; None before its first step."""
        return None if self._last_step is None else time.monotonic() - self._last_step

    @property
    def checkpoint_age(self) -> float | None:
        """Seconds of training that a kill would lose; None before `record_checkpoint`, which only the chief calls."""
        return None if self._saved is None else time.monotonic() - self._saved

    def describe(self) -> str:
        """Describe the activity and, in a `waiting_for` block, the peer or library that the main thread waits for."""
        return f"{self.activity}, waiting for {self._waiting_for}" if self._waiting_for else self.activity

    def describe_stall(self) -> str | None:
        """Describe the current stall by its duration and activity; return None if there is no stall."""
        seconds = self.seconds_since_progress
        if seconds <= self.stuck_after:
            return None
        step = f" after step {self.values['step']:.0f}" if "step" in self.values else ""
        timeout = f"runtime.stuck_after={self.stuck_after:g}"
        return f"stalled: no progress for {seconds:.0f} s ({timeout}) in: {self.activity}{step}"


health = Health()  # the health of this process, which all modules use
