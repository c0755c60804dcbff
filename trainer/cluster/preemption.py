"""Being told to stop: the first SIGTERM or SIGINT sets a flag, the second ends the process at once."""

from __future__ import annotations

import os
import signal
from types import FrameType

from trainer.errors import INTERRUPTED


class StopFlag:
    """Install after the strategy exists: TensorFlow's coordination service replaces handlers set earlier."""

    def __init__(self) -> None:
        self.reason: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._told)

    def _told(self, number: int, _frame: FrameType | None) -> None:
        if self.reason:
            os._exit(INTERRUPTED)
        self.reason = signal.Signals(number).name
        os.write(2, f"\n{self.reason}: saving at the next step, then stopping (again to stop at once)\n".encode())
