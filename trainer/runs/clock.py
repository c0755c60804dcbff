"""Measure a run's time breakdown: the seconds in each category since its first start.

A start is one process of the run; an interrupted run has several.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.monitoring.health import health
from trainer.storage.local import write_json
from trainer.storage.small_files import read_json_or_default, require_json_object, require_nonnegative

CATEGORIES = (
    "train",  # training, except for steps that were lost
    "wait",  # waiting for data in training, validation or evaluation
    "compile",  # set-up of a phase and its first device call
    "start",  # from the start of the process until the first phase
    "features",  # computing the features of frozen layers; counts towards goodput
    "checkpoint",  # writing a checkpoint
    "evaluation",  # validation, and at the end the evaluation of the test split
    "finish",  # report and export
    "lost",  # training steps after a process's last checkpoint, which the next process repeats
    "down",  # no process of the run was active
)
BREAKDOWN_FILE = "ledger.json"  # in the run's folder
WRITE_SECONDS = 5.0  # minimum interval between two writes of the file while the clock runs


def parse_breakdown(value: Any) -> dict[str, float]:
    """Return the seconds by category from a decoded ledger.json, and `as_of`, the time.time() that they extend to.

    Unknown categories are ignored. Raises one of `trainer.storage.small_files.CONTENT_ERRORS` if the content is
    invalid.
    """
    fields = require_json_object(value)
    seconds = {
        name: require_nonnegative(spent)
        for name, spent in require_json_object(fields["seconds"]).items()
        if name in CATEGORIES
    }
    return seconds | {"as_of": require_nonnegative(fields["as_of"])}


class Clock:
    """Counts each second since the run's first start in exactly one category.

    This is the category of the innermost open `span`, or `start` if no span is open.
    """

    def __init__(self, file: Path | None, process_started: float) -> None:
        """Continue the breakdown that an earlier start has written.

        Args:
            file: the file to read and write, which can be missing or corrupt; None to read and write nothing.
            process_started: time.time() at the start of the process.
        """
        self.file, self._last, self._written = file, process_started, 0.0
        self._category, self._waited = "start", 0.0  # category of the open span, and its seconds that count in `wait`
        self.seconds = dict.fromkeys(CATEGORIES, 0.0)
        stored: dict[str, float] = read_json_or_default(file, parse_breakdown, default={}) if file else {}
        if stored:
            as_of = stored.pop("as_of")
            self.seconds |= stored
            self.seconds["down"] += max(process_started - as_of, 0.0)

    @contextmanager
    def span(self, category: str, activity: str = "") -> Iterator[None]:
        """Count the time of this block in `category`. Until its end, /healthz shows `activity`, if it is not empty."""
        outer_category, outer_activity = self._category, health.activity
        self._attribute(category)
        if activity:
            health.set_activity(activity)
        try:
            yield
        finally:
            self._attribute(outer_category)
            if activity:
                health.set_activity(outer_activity)

    def add_wait(self, seconds: float) -> None:
        """Count `seconds` of the open span in `wait` instead of in the span's category."""
        self._waited += seconds

    def update(self) -> None:
        """Count the time until now in the category of the open span, so that `seconds` is up to date."""
        self._attribute(self._category)

    def _attribute(self, next_category: str) -> None:
        """Count the time since the last call in the current category, and then change to `next_category`."""
        now = time.time()
        spent = max(now - self._last, 0.0)
        waited = min(self._waited, spent)
        self.seconds[self._category] += spent - waited
        self.seconds["wait"] += waited
        self._last, self._category, self._waited = now, next_category, 0.0
        if now - self._written > WRITE_SECONDS:
            self.write()

    def move_lost_time(self, train_seconds: float) -> None:
        """Move the training time after the restored checkpoint to `lost`.

        `train_seconds` is the run's training time up to that checkpoint.
        """
        lost = max(self.seconds["train"] - train_seconds, 0.0)
        self.seconds["train"] -= lost
        self.seconds["lost"] += lost

    @property
    def goodput(self) -> float:
        """Fraction of the time since the first start that was counted in `train` or `features`, 0..1."""
        return (self.seconds["train"] + self.seconds["features"]) / max(sum(self.seconds.values()), 1e-9)

    def images_per_second(self, images: float) -> float:
        """Return the mean training throughput; `images` is the number of images that the run has trained on so far."""
        return images / max(self.seconds["train"], 1e-9)

    def report(self, images: float) -> dict[str, Any]:
        """Return `seconds` by category, `goodput`, the number of trained `images`, and `images_per_second`."""
        self.update()
        return {
            "seconds": {category: round(spent, 3) for category, spent in self.seconds.items()},
            "goodput": round(self.goodput, 4),
            "images": int(images),
            "images_per_second": round(self.images_per_second(images), 1),
        }

    def write(self) -> None:
        """Write the breakdown as of the last `update` or change of category, to `file` if there is one."""
        self._written = time.time()
        if self.file:
            write_json(self.file, {"as_of": self._last, "seconds": {k: round(v, 3) for k, v in self.seconds.items()}})
