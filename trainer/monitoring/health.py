"""Health of this process for `/healthz`, `/metrics` and the log: its activity, last progress and gauges.

The main thread sets the activity, and any thread can read the health or record progress. There is no lock: single
operations are atomic under the GIL, but a reader can combine values from before and after a change.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

START, FINISH = "start", "finish"


class Health:
    """The activity, last progress and gauges of a process."""

    def __init__(self) -> None:
        self.phase = START  # or the name of a phase of training, or FINISH
        self.activity = "starting"  # what the main thread does, in a few words
        self.stuck_after = float("inf")  # seconds without progress that count as a stall (`runtime.stuck_after`)
        # Sends the state to the watchdog; called by `set_activity` and by `ControlChannel` when watched peers change.
        self.on_change: Callable[[], None] = lambda: None
        self.values: dict[str, float] = {}  # gauges set so far, by name: step, epoch, loss, ...
        self.work = (0, 0)  # completed and total units of the activity; total is 0 if unknown
        self.work_began = (0, 0.0)  # parts that were done when they were counted first, and the time of that
        self.activity_began = self._last_progress = time.monotonic()
        self._last_step: float | None = None
        self._saved: float | None = None
        self._waiting_for: str | None = None
        self._blocked_timeout: float | None = None

    def enter_phase(self, phase: str) -> None:
        """Set the phase of the run, and its name as the activity."""
        self.phase = phase
        self.set_activity(phase)

    def set_activity(self, activity: str) -> None:
        """Set the activity of the main thread. This counts as progress."""
        if activity != self.activity:
            self.activity, self.work, self.activity_began = activity, (0, 0), time.monotonic()
        self.record_progress()
        self.on_change()

    def record_progress(self, done: int = 0, total: int = 0) -> None:
        """Record progress: a step, a batch, a chunk of a file, or an iteration of a loop with a timeout.

        `done` of the `total` units of the activity are complete; 0 and 0 if the total is unknown. An activity can have
        several loops in sequence, each with its own units.
        """
        self._last_progress = time.monotonic()
        if total:
            if total != self.work[1] or done < self.work[0]:
                self.work_began = (done, self._last_progress)
            self.work = (done, total)

    def seconds_left(self, now: float) -> float | None:
        """Estimate the seconds until all counted parts are done; None before the second part."""
        (done, total), (first, began) = self.work, self.work_began
        return (now - began) / (done - first) * (total - done) if done > first else None

    def record_steps(self, step: int, epoch: int) -> None:
        """Record that the run has taken `step` optimizer steps and is in `epoch`, counted from 1."""
        self.record_progress()
        self._last_step = self._last_progress
        self.set_gauges(step=step, epoch=epoch)

    def record_checkpoint(self, seconds_ago: float = 0.0) -> None:
        """Record that the state as of `seconds_ago` is saved, or that training begins with nothing to lose."""
        self._saved = time.monotonic() - seconds_ago

    def set_gauges(self, **values: float) -> None:
        """Set gauges by name, such as loss."""
        self.values |= values

    @contextmanager
    def waiting_for(self, target: str) -> Iterator[None]:
        """Disable stall detection while the main thread waits for a peer, or for a library without progress reports."""
        self._waiting_for = target
        try:
            yield
        finally:
            self._waiting_for = None
            self.record_progress()

    @contextmanager
    def blocked_in(self, activity: str, timeout: float) -> Iterator[None]:
        """Set the activity to a call that holds the GIL, so that Python might not run for up to `timeout` seconds."""
        outer, self._blocked_timeout = self.activity, timeout
        self.set_activity(activity)
        try:
            yield
        finally:
            self._blocked_timeout = None
            self.set_activity(outer)

    @property
    def unresponsive_timeout(self) -> float:
        """Seconds without any Python code running, after which the watchdog ends this process."""
        return self.stuck_after if self._blocked_timeout is None else self._blocked_timeout

    @property
    def seconds_since_progress(self) -> float:
        """Seconds since the last progress; 0 within `waiting_for`."""
        return 0.0 if self._waiting_for else time.monotonic() - self._last_progress

    @property
    def step_age(self) -> float | None:
        """Seconds since this process took its last step; None before the first."""
        return None if self._last_step is None else time.monotonic() - self._last_step

    @property
    def checkpoint_age(self) -> float | None:
        """Seconds of work that a kill would lose; None without a recorded checkpoint, as on all but the chief."""
        return None if self._saved is None else time.monotonic() - self._saved

    def describe(self) -> str:
        """Describe the activity, and what it waits for."""
        return f"{self.activity}, waiting for {self._waiting_for}" if self._waiting_for else self.activity

    def stall_reason(self) -> str | None:
        """Describe the duration and activity of a stall; None if the process makes progress."""
        seconds = self.seconds_since_progress
        if seconds <= self.stuck_after:
            return None
        step = f" after step {self.values['step']:.0f}" if "step" in self.values else ""
        timeout = f"runtime.stuck_after={self.stuck_after:g}"
        return f"stalled: no progress for {seconds:.0f} s ({timeout}) in: {self.activity}{step}"


health = Health()  # the health of this process
