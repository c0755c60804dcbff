"""Health of this process for `/healthz`, `/metrics` and the log: its activity, last progress and gauges.

Nothing here blocks, so any thread may call it at any time.
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
        self.on_change: Callable[[], None] = lambda: None  # called when the activity or a limit changes
        self.values: dict[str, float] = {}  # gauges that are set so far, by name: step, epoch, loss, ...
        self.work = (0, 0)  # parts of the activity that are done, and their number; 0 if it is not known
        self.work_began = (0, 0.0)  # parts that were done when they were counted first, and the time of that
        self.activity_began = self._last_progress = time.monotonic()
        self._last_step: float | None = None
        self._saved: float | None = None
        self._waiting_for: str | None = None
        self._blocked_limit: float | None = None

    def enter_phase(self, phase: str) -> None:
        """Set the phase of the run, and set the activity to the name of the phase."""
        self.phase = phase
        self.set_activity(phase)

    def set_activity(self, activity: str) -> None:
        """Set the activity of the main thread, which counts as progress."""
        if activity != self.activity:
            self.activity, self.work, self.activity_began = activity, (0, 0), time.monotonic()
        self.progress()
        self.on_change()

    def progress(self, done: int = 0, total: int = 0) -> None:
        """Record progress: a step, a batch, a part of a file, or an iteration of a loop with a time limit.

        `done` of the `total` parts of the activity are done, if their number is known. An activity may count several
        kinds of parts, one after the other.
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
        """Record that optimizer steps were taken: up to `step` of the run, in `epoch`, counted from 1."""
        self.progress()
        self._last_step = self._last_progress
        self.set_gauges(step=step, epoch=epoch)

    def record_checkpoint(self, seconds_ago: float = 0.0) -> None:
        """Record that the state of `seconds_ago` is saved, or that training begins and there is nothing to lose."""
        self._saved = time.monotonic() - seconds_ago

    def set_gauges(self, **values: float) -> None:
        """Set gauges by name, such as loss."""
        self.values |= values

    @contextmanager
    def waiting_for(self, peer: str) -> Iterator[None]:
        """Disable stall detection while the main thread waits for a peer, which has its own health and heartbeat."""
        self._waiting_for = peer
        try:
            yield
        finally:
            self._waiting_for = None
            self.progress()

    @contextmanager
    def blocked_in(self, activity: str, limit: float) -> Iterator[None]:
        """Set the activity, a call in which Python may not run for `limit` seconds, as the call holds the GIL."""
        outer, self._blocked_limit = self.activity, limit
        self.set_activity(activity)
        try:
            yield
        finally:
            self._blocked_limit = None
            self.set_activity(outer)

    @property
    def unresponsive_limit(self) -> float:
        """Seconds for which Python may not run at all in this process."""
        return self.stuck_after if self._blocked_limit is None else self._blocked_limit

    @property
    def seconds_since_progress(self) -> float:
        """Seconds since the last progress; 0 while the main thread waits for a peer."""
        return 0.0 if self._waiting_for else time.monotonic() - self._last_progress

    @property
    def step_age(self) -> float | None:
        """Seconds since this process took its last step; None before the first."""
        return None if self._last_step is None else time.monotonic() - self._last_step

    @property
    def checkpoint_age(self) -> float | None:
        """Seconds of work that a kill would lose; None if no checkpoint is recorded here, as on all but the chief."""
        return None if self._saved is None else time.monotonic() - self._saved

    def describe(self) -> str:
        """Describe the activity in a few words."""
        return f"{self.activity}, waiting for {self._waiting_for}" if self._waiting_for else self.activity

    def stall_reason(self) -> str | None:
        """Describe the stall: its activity and duration; None if the process makes progress."""
        seconds = self.seconds_since_progress
        if seconds <= self.stuck_after:
            return None
        step = f" after step {self.values['step']:.0f}" if "step" in self.values else ""
        limit = f"runtime.stuck_after={self.stuck_after:g}"
        return f"stalled: no progress for {seconds:.0f} s ({limit}) in: {self.activity}{step}"


health = Health()  # the health of this process
