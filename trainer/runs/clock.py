"""Time breakdown of a run since its first start, by category."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.monitoring.health import health
from trainer.storage.local import write_json

CATEGORIES = (
    "train",  # steps that count
    "wait",  # for data
    "compile",  # setup of a phase and its first call
    "start",  # from the start of the process to the first phase
    "features",  # computing the features of frozen layers; counts as productive
    "checkpoint",
    "evaluation",
    "finish",  # export and report
    "lost",  # steps that were lost with the process and repeated
    "down",  # no process was running
)
WRITE_SECONDS = 5.0  # interval of writing the file; a kill loses at most this


class Clock:
    """Seconds by category; every second since the first start is in exactly one.

    Time is attributed to the innermost open span, or to `start`. A span also sets the activity of `/healthz`.
    """

    def __init__(self, file: Path | None, began: float) -> None:
        """`file`: for the breakdown, or None. `began`: time.time() at the start of this process."""
        self.file, self._last, self._written = file, began, 0.0
        self._category, self._waited = "start", 0.0
        self.seconds = dict.fromkeys(CATEGORIES, 0.0)  # since the first start of the run
        if file and file.exists():
            try:
                before = json.loads(file.read_text())
                self.seconds |= {category: float(spent) for category, spent in before["seconds"].items()}
                self.seconds["down"] += max(began - before["as_of"], 0.0)
            except (ValueError, KeyError, TypeError):  # damaged: begin a new breakdown
                self.seconds = dict.fromkeys(CATEGORIES, 0.0)

    @contextmanager
    def span(self, category: str, activity: str = "") -> Iterator[None]:
        """Attribute the time of the block to `category`; `activity` is a few words for `/healthz`."""
        outer, outer_activity = self._category, health.activity
        self._attribute(category)
        if activity:
            health.set_activity(activity)
        try:
            yield
        finally:
            self._attribute(outer)
            if activity:
                health.set_activity(outer_activity)

    def waited(self, seconds: float) -> None:
        """Attribute this many seconds of the open span to `wait`."""
        self._waited += seconds

    def lap(self) -> None:
        """Attribute the time so far to the open category."""
        self._attribute(self._category)

    def _attribute(self, following: str) -> None:
        now = time.time()
        spent = max(now - self._last, 0.0)
        waited = min(self._waited, spent)
        self.seconds[self._category] += spent - waited
        self.seconds["wait"] += waited
        self._last, self._category, self._waited = now, following, 0.0
        if now - self._written > WRITE_SECONDS:
            self.write()

    def resumed(self, saved: float) -> None:
        """Attribute training time after the restored checkpoint, made at `saved` seconds of training, to `lost`."""
        lost = max(self.seconds["train"] - saved, 0.0)
        self.seconds["train"] -= lost
        self.seconds["lost"] += lost

    @property
    def goodput(self) -> float:
        """Fraction of the time since the first start that was spent on steps that count and on features."""
        return (self.seconds["train"] + self.seconds["features"]) / max(sum(self.seconds.values()), 1e-9)

    def report(self, images: float) -> dict[str, Any]:
        """The breakdown for the report: seconds by category, goodput, and images/s for `images` in total."""
        self.lap()
        return {
            "seconds": {category: round(spent, 3) for category, spent in self.seconds.items()},
            "goodput": round(self.goodput, 4),
            "images": int(images),
            "images_per_second": round(images / max(self.seconds["train"], 1e-9), 1),
        }

    def write(self) -> None:
        """Write the breakdown; thread-safe."""
        self._written = time.time()
        if self.file:
            write_json(self.file, {"as_of": self._last, "seconds": {k: round(v, 3) for k, v in self.seconds.items()}})
