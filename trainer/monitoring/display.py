"""The last line of a terminal while a run works: phase, epoch, bar and time left first, then the figures that fit."""

import math
import time
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.text import Text

from trainer.monitoring.health import FINISH, START, health
from trainer.monitoring.log import set_display

REFRESHES_PER_SECOND = 4
MAX_NAME = 24  # characters of the name of a phase
FULL, EMPTY = "━", "╌"


def format_duration(seconds: float) -> str:
    """Format seconds: 75 as "1:15", 3700 as "1:01:40"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


@dataclass(frozen=True)
class PhaseProgress:
    """A phase of training, and where this process began in it."""

    name: str
    first_step: int  # of the run, with which the phase begins
    steps: int
    last_epoch: int  # of the run, counted from 1
    began_step: int  # step of the run at which this process entered the phase
    began: float = field(default_factory=time.monotonic)

    def seconds_left(self, step: int, now: float) -> float | None:
        """Estimate the seconds until the end of the phase, validation included; None before its first step."""
        done, left = step - self.began_step, self.first_step + self.steps - step
        return (now - self.began) / done * left if done > 0 else None


def progress_line(width: int, phase: PhaseProgress | None, figures: list[str], now: float) -> str:
    """Return the line for a terminal of `width` columns, from `health` and the `figures` of the last log interval.

    While the phase trains the bar is that of the phase, otherwise that of the current activity. The first parts are
    always complete from 80 columns on; of the figures, those that fit follow.
    """
    done, total, parts, left = *health.work, [health.describe()], health.seconds_left(now)
    if phase and health.phase == phase.name and health.activity in ("training", phase.name):
        step, epoch = int(health.values.get("step", 0)), int(health.values.get("epoch", 1))
        parts = [phase.name[:MAX_NAME], f"epoch {epoch}/{phase.last_epoch}"]
        done, total, left = step - phase.first_step, phase.steps, phase.seconds_left(step, now)
    elif phase and health.phase not in (START, FINISH):
        parts = [phase.name[:MAX_NAME], *parts]
    if total:
        size = max(min(width // 8, 30), 5)
        full = min(size * done // total, size)
        parts += [FULL * full + EMPTY * (size - full), f"{min(done / total, 1):4.0%}"]
        parts.append(f"left {'-:--' if left is None else format_duration(math.ceil(left))}")
    else:
        parts.append(format_duration(now - health.activity_began))
    line = "  ".join(parts)
    for figure in figures:
        if len(line) + 2 + len(figure) < width:
            line += f"  {figure}"
    return line[: width - 1]  # a full line would wrap on some terminals


class Display:
    """Draws `progress_line` at the bottom of a terminal, below the lines of the log; `stop` erases it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.phase: PhaseProgress | None = None
        self.figures: list[str] = []  # of training, the most important first
        self._live = Live(
            get_renderable=self._render, console=console, transient=True, refresh_per_second=REFRESHES_PER_SECOND
        )
        self._live.start()
        set_display(1 if console.is_terminal else None)

    def _render(self) -> Text:
        line = progress_line(self.console.width, self.phase, self.figures, time.monotonic())
        if not self.console.encoding.startswith("utf"):
            line = line.replace(FULL, "#").replace(EMPTY, "-")
        return Text(line, no_wrap=True, overflow="crop")

    def stop(self) -> None:
        """Erase the line."""
        self._live.stop()
        set_display(None)
