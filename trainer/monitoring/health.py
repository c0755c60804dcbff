"""The activity of this process and its last progress, for `/healthz` and `/metrics`.

Nothing here waits, locks or draws: any thread may call anything at any time.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

START, FINISH = "start", "finish"


class Health:
    """The activity, progress and gauges of a process.

    Attributes:
        phase: START, the name of a phase of training, or FINISH.
        activity: what the main thread does, in a few words.
        stuck_after: seconds without progress that are too many (`runtime.stuck_after`).
        values: gauges by name, as far as they are known: step, epoch, loss, ...
    """

    def __init__(self) -> None:
        self.phase, self.activity, self.stuck_after = START, "starting", float("inf")
        self.values: dict[str, float] = {}
        self._moved = time.monotonic()
        self._stepped: float | None = None
        self._saved: float | None = None
        self._waiting_for: str | None = None

    def enter_phase(self, phase: str) -> None:
        """Begin another part of the run."""
        self.phase = phase
        self.set_activity(phase)

    def set_activity(self, activity: str) -> None:
        """Note that the main thread begins something else."""
        self.activity = activity
        self.progress()

    def progress(self) -> None:
        """Note progress: a step, a batch, a part of a file, or a round of a loop with a time limit of its own."""
        self._moved = time.monotonic()

    def steps_taken(self, step: int, epoch: int) -> None:
        """Note that the optimizer has taken steps; `step` is the run's, `epoch` counts from 1."""
        self.progress()
        self._stepped = self._moved
        self.set_gauges(step=step, epoch=epoch)

    def checkpoint_saved(self, seconds_ago: float = 0.0) -> None:
        """Note that the state of `seconds_ago` is committed, or that training begins with nothing to lose."""
        self._saved = time.monotonic() - seconds_ago

    def set_gauges(self, **values: float) -> None:
        """Set gauges."""
        self.values |= values

    @contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """Count no silence while progress is made and watched elsewhere: another worker has a health of its own, and
        its silence ends all of them within seconds.
        """
        self._waiting_for = what
        try:
            yield
        finally:
            self._waiting_for = None
            self.progress()

    @property
    def seconds_since_progress(self) -> float:
        """Seconds since the last progress; 0 while none is to be expected."""
        return 0.0 if self._waiting_for else time.monotonic() - self._moved

    @property
    def step_age(self) -> float | None:
        """Seconds since this process took its last step; None before the first."""
        return None if self._stepped is None else time.monotonic() - self._stepped

    @property
    def checkpoint_age(self) -> float | None:
        """Seconds of work that would be lost now; None where somebody else saves."""
        return None if self._saved is None else time.monotonic() - self._saved

    def describe(self) -> str:
        """The activity, in a few words."""
        return f"{self.activity}, waiting for {self._waiting_for}" if self._waiting_for else self.activity

    def stall_reason(self) -> str | None:
        """A sentence on why this process counts as stuck; None as long as it makes progress."""
        silence = self.seconds_since_progress
        if silence <= self.stuck_after:
            return None
        step = f" after step {self.values['step']:.0f}" if "step" in self.values else ""
        return (
            f"stuck: nothing has moved for {silence:.0f} s (runtime.stuck_after={self.stuck_after:g}) "
            f"in: {self.activity}{step}"
        )


health = Health()  # of this process
