"""Time breakdown of a run since its first start, by category."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.monitoring.health import health
from trainer.storage.local import write_json
from trainer.storage.small_files import read_json_or_default, require_json_object, require_nonnegative

CATEGORIES = (
    "train",  # training steps that were not lost
    "wait",  # waiting for training or validation data
    "compile",  # set-up of a phase and its first device call
    "start",  # from the start of the process until the first phase
    "features",  # computing the features of frozen layers; counts towards goodput
    "checkpoint",  # writing a checkpoint
    "evaluation",  # of the validation split, and of the test split at the end
    "finish",  # report and export
    "lost",  # training steps after the last checkpoint of a process, which the next one repeated
    "down",  # no process of the run existed
)
LEDGER = "ledger.json"  # in the folder of a run
WRITE_SECONDS = 5.0  # minimal interval between two writes of the file


def breakdown_of(value: Any) -> dict[str, float]:
    """Return the seconds by category and `as_of` of a ledger.json; raise one of `CONTENT_ERRORS` if it is damaged."""
    fields = require_json_object(value)
    seconds = {
        name: require_nonnegative(spent)
        for name, spent in require_json_object(fields["seconds"]).items()
        if name in CATEGORIES
    }
    return seconds | {"as_of": require_nonnegative(fields["as_of"])}


class Clock:
    """Seconds by category; each second since the first start of the run counts in exactly one.

    Time counts in the category of the innermost open span, and outside of all spans in `start`.
    """

    def __init__(self, file: Path | None, process_started: float) -> None:
        """Continue the breakdown in `file` if it exists and is intact; None: write none.

        `process_started` is time.time() when the process started.
        """
        self.file, self._last, self._written = file, process_started, 0.0
        self._category, self._waited = "start", 0.0  # of the open span
        self.seconds = dict.fromkeys(CATEGORIES, 0.0)
        saved: dict[str, float] = read_json_or_default(file, breakdown_of, {}) if file else {}
        if saved:
            as_of = saved.pop("as_of")
            self.seconds |= saved
            self.seconds["down"] += max(process_started - as_of, 0.0)

    @contextmanager
    def span(self, category: str, activity: str = "") -> Iterator[None]:
        """Count the time of the block in `category`, and report `activity`, a few words, at `/healthz` meanwhile."""
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

    def add_wait(self, seconds: float) -> None:
        """Count this many seconds of the open span in `wait` instead."""
        self._waited += seconds

    def lap(self) -> None:
        """Count the time until now in the open category."""
        self._attribute(self._category)

    def _attribute(self, next_category: str) -> None:
        """Count the time since the last call in the open category, and open another one."""
        now = time.time()
        spent = max(now - self._last, 0.0)
        waited = min(self._waited, spent)
        self.seconds[self._category] += spent - waited
        self.seconds["wait"] += waited
        self._last, self._category, self._waited = now, next_category, 0.0
        if now - self._written > WRITE_SECONDS:
            self.write()

    def move_lost_time(self, train_seconds: float) -> None:
        """Move to `lost` the training time beyond `train_seconds`, the time at the restored checkpoint."""
        lost = max(self.seconds["train"] - train_seconds, 0.0)
        self.seconds["train"] -= lost
        self.seconds["lost"] += lost

    @property
    def goodput(self) -> float:
        """Fraction of the time since the first start that is in `train` and `features`."""
        return (self.seconds["train"] + self.seconds["features"]) / max(sum(self.seconds.values()), 1e-9)

    def images_per_second(self, images: float) -> float:
        """Return the throughput of training, given the images that were trained in all."""
        return images / max(self.seconds["train"], 1e-9)

    def report(self, images: float) -> dict[str, Any]:
        """Return the breakdown for the report, with the throughput of `images` trained in all."""
        self.lap()
        return {
            "seconds": {category: round(spent, 3) for category, spent in self.seconds.items()},
            "goodput": round(self.goodput, 4),
            "images": int(images),
            "images_per_second": round(self.images_per_second(images), 1),
        }

    def write(self) -> None:
        """Write the breakdown until the last attribution; thread-safe."""
        self._written = time.time()
        if self.file:
            write_json(self.file, {"as_of": self._last, "seconds": {k: round(v, 3) for k, v in self.seconds.items()}})
