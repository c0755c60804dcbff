"""Time accounting of a run since its first start, by category."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.monitoring.health import health
from trainer.storage.local import write_json

CATEGORIES = (
    "train",  # steps whose result the run still has: productive
    "wait",  # the device had no data
    "compile",  # setting a phase up, and its first call
    "start",  # from the start of the process to the first phase
    "features",  # productive too: computing the features of frozen layers, once
    "checkpoint",
    "evaluation",
    "finish",  # export and report
    "lost",  # steps that were taken, then lost with the process, and taken again
    "down",  # no process was there
)
WRITE_SECONDS = 5.0  # between two writes: what a kill can hide from the account


class Clock:
    """Seconds by category; every second since the first start is in exactly one.

    Time goes to the innermost open span, to `start` outside of all. A span also sets the activity of `/healthz`.
    """

    def __init__(self, file: Path | None, began: float) -> None:
        """`file`: where the account is written, None: nowhere. `began`: time.time() at which this process started."""
        self.file, self._last, self._written = file, began, 0.0
        self._category, self._waited = "start", 0.0
        self.seconds = dict.fromkeys(CATEGORIES, 0.0)  # since the first start of the run
        if file and file.exists():
            try:
                before = json.loads(file.read_text())
                self.seconds |= {category: float(spent) for category, spent in before["seconds"].items()}
                self.seconds["down"] += max(began - before["as_of"], 0.0)
            except (ValueError, KeyError, TypeError):  # damaged: only the account is lost
                self.seconds = dict.fromkeys(CATEGORIES, 0.0)

    @contextmanager
    def span(self, category: str, activity: str = "") -> Iterator[None]:
        """Count the time within to `category`; `activity` is a few words for `/healthz`."""
        outer, was = self._category, health.activity
        self._attribute(category)
        if activity:
            health.set_activity(activity)
        try:
            yield
        finally:
            self._attribute(outer)
            if activity:
                health.set_activity(was)

    def waited(self, seconds: float) -> None:
        """Count so many seconds of the open span as waiting for data."""
        self._waited += seconds

    def lap(self) -> None:
        """Count the time so far to the open category."""
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
        """Count training time since the checkpoint that the run resumes from, made after `saved` seconds, as lost."""
        lost = max(self.seconds["train"] - saved, 0.0)
        self.seconds["train"] -= lost
        self.seconds["lost"] += lost

    @property
    def goodput(self) -> float:
        """Fraction of the time since the first start that went into steps or features that the run still has."""
        return (self.seconds["train"] + self.seconds["features"]) / max(sum(self.seconds.values()), 1e-9)

    def report(self, images: float) -> dict[str, Any]:
        """The account for people: seconds by category, goodput, and the rate at which `images` were trained on."""
        self.lap()
        return {
            "seconds": {category: round(spent, 3) for category, spent in self.seconds.items()},
            "goodput": round(self.goodput, 4),
            "images": int(images),
            "images_per_second": round(images / max(self.seconds["train"], 1e-9), 1),
        }

    def write(self) -> None:
        """Write the account; from any thread."""
        self._written = time.time()
        if self.file:
            write_json(self.file, {"as_of": self._last, "seconds": {k: round(v, 3) for k, v in self.seconds.items()}})
