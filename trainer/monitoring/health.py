"""Health of this process for `/healthz` and `/metrics`: its activity and last progress.

Nothing here blocks: any thread may call anything at any time.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

START, FINISH = "start", "finish"


class Health:
    """The activity, progress and gauges of a process.

    Attributes:
        phase: START, the name of a phase of training, or FINISH.
        activity: a few words on what the main thread does.
        stuck_after: seconds without progress that count as a stall (`runtime.stuck_after`).
        values: known gauges by name: step, epoch, loss, ...
    """

    def __init__(self) -> None:
        self.phase, self.activity, self.stuck_after = START, "starting", float("inf")
        self.values: dict[str, float] = {}
        self._last_progress = time.monotonic()
        self._last_step: float | None = None
        self._saved: float | None = None
        self._waiting_for: str | None = None

    def enter_phase(self, phase: str) -> None:
        """Set the phase of the run, and the activity to its name."""
        self.phase = phase
        self.set_activity(phase)

    def set_activity(self, activity: str) -> None:
        """Set the activity of the main thread, which counts as progress."""
        self.activity = activity
        self.progress()

    def progress(self) -> None:
        """Record progress: a step, a batch, a part of a file, or an iteration of a loop with a time limit."""
        self._last_progress = time.monotonic()

    def steps_taken(self, step: int, epoch: int) -> None:
        """Record optimizer steps; `step` counts from the start of the run, `epoch` from 1."""
        self.progress()
        self._last_step = self._last_progress
        self.set_gauges(step=step, epoch=epoch)

    def checkpoint_saved(self, seconds_ago: float = 0.0) -> None:
        """Record that the state of `seconds_ago` is committed, or that training begins."""
        self._saved = time.monotonic() - seconds_ago

    def set_gauges(self, **values: float) -> None:
        self.values |= values

    @contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """Disable stall detection while another worker computes: it has its own, and a heartbeat timeout."""
        self._waiting_for = what
        try:
            yield
        finally:
            self._waiting_for = None
            self.progress()

    @property
    def seconds_since_progress(self) -> float:
        """Seconds since the last progress; 0 while another worker computes."""
        return 0.0 if self._waiting_for else time.monotonic() - self._last_progress

    @property
    def step_age(self) -> float | None:
        """Seconds since this process took its last step; None before the first."""
        return None if self._last_step is None else time.monotonic() - self._last_step

    @property
    def checkpoint_age(self) -> float | None:
        """Seconds of work that a kill would lose; None if another worker saves."""
        return None if self._saved is None else time.monotonic() - self._saved

    def describe(self) -> str:
        """Describe the activity in a few words."""
        return f"{self.activity}, waiting for {self._waiting_for}" if self._waiting_for else self.activity

    def stall_reason(self) -> str | None:
        """The activity and duration of a stall; None if the process makes progress."""
        seconds = self.seconds_since_progress
        if seconds <= self.stuck_after:
            return None
        step = f" after step {self.values['step']:.0f}" if "step" in self.values else ""
        limit = f"runtime.stuck_after={self.stuck_after:g}"
        return f"stalled: no progress for {seconds:.0f} s ({limit}) in: {self.activity}{step}"


health = Health()  # of this process
