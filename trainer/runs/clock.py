"""Where the time of a run went, since its first start: every second of it is in one place."""

from __future__ import annotations

import json
import time
from pathlib import Path

from trainer.storage.local import write_json

PLACES = (
    "train",  # steps whose result is kept: a good place
    "wait",  # the device had no data
    "compile",  # the first call of a phase
    "start",  # from the start of the process to the first call
    "features",  # the other good place: what frozen layers make of the images, once
    "checkpoint",
    "evaluation",
    "finish",  # export and report
    "lost",  # steps that were taken, then lost with the process, and taken again
    "down",  # no process was there
)
WRITE_SECONDS = 5.0  # between two writes: what a kill can hide from the ledger


class Ledger:
    """Seconds by place. One clock runs; `mark` says where the time since the last mark went.

    Attributes:
        seconds: place -> seconds since the first start of the run.
    """

    def __init__(self, file: Path | None, began: float) -> None:
        """`file`: where it is kept, None keeps nothing. `began`: time.time() at which this process started."""
        self.file, self._last, self._written = file, began, 0.0
        self.seconds = dict.fromkeys(PLACES, 0.0)
        if file and file.exists():
            try:
                before = json.loads(file.read_text())
                self.seconds |= {place: float(spent) for place, spent in before["seconds"].items()}
                self.seconds["down"] += max(began - before["as_of"], 0.0)
            except (ValueError, KeyError, TypeError):  # damaged: only accounting is lost
                self.seconds = dict.fromkeys(PLACES, 0.0)

    def mark(self, place: str, waited: float = 0.0) -> None:
        """The time since the last mark went to `place`, but for `waited` seconds of waiting for data."""
        now = time.time()
        spent = max(now - self._last, 0.0)
        waited = min(waited, spent)
        self.seconds[place] += spent - waited
        self.seconds["wait"] += waited
        self._last = now
        if now - self._written > WRITE_SECONDS:
            self.write()

    def resumed(self, kept: float) -> None:
        """The run goes on from a checkpoint that was made after `kept` seconds of training."""
        lost = max(self.seconds["train"] - kept, 0.0)
        self.seconds["train"] -= lost
        self.seconds["lost"] += lost

    @property
    def goodput(self) -> float:
        """Share of the time since the first start in which steps were taken, or features computed, that are kept."""
        return (self.seconds["train"] + self.seconds["features"]) / max(sum(self.seconds.values()), 1e-9)

    def write(self) -> None:
        """Keep the account."""
        self._written = time.time()
        if self.file:
            write_json(self.file, {"as_of": self._last, "seconds": {k: round(v, 3) for k, v in self.seconds.items()}})
