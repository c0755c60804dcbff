"""The status line at the bottom of a terminal: phase, epoch, progress bar, time left, and the figures that fit."""

import math
import time
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.text import Text

from trainer.monitoring.health import FINISH, START, health
from trainer.monitoring.log import set_display

REFRESHES_PER_SECOND = 4
MAX_NAME_LENGTH = 24  # characters of the name of a phase; longer names are truncated
BAR_FULL, BAR_EMPTY = "━", "╌"  # characters of the progress bar


def format_duration(seconds: float) -> str:
    """Format a duration in seconds: "1:15" for 75, "1:01:40" for 3700."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


@dataclass(frozen=True)
class PhaseProgress:
    """The extent of a training phase in a run, and the step and time at which this process entered it."""

    name: str
    first_step: int  # steps of the run before the phase
    steps: int  # maximum length of the phase
    last_epoch: int  # epoch of the run in which the phase ends, counted from 1
    began_step: int  # step of the run at which this process entered the phase
    began: float = field(default_factory=time.monotonic)  # time.monotonic() of that

    def seconds_left(self, step: int, now: float) -> float | None:
        """Estimate the seconds until the end of the phase, including validation, at the time.monotonic() `now`.

        `step` is the current step of the run. None until this process has completed a step of the phase.
        """
        steps_done, steps_left = step - self.began_step, self.first_step + self.steps - step
        return (now - self.began) / steps_done * steps_left if steps_done > 0 else None


def format_progress_line(width: int, phase: PhaseProgress | None, figures: list[str], now: float) -> str:
    """Format the status line for a terminal of `width` columns.

    While the phase trains, the bar shows its progress, otherwise that of the current activity (`Health.work`). In at
    least 80 columns, all fields before the figures are complete.

    Args:
        phase: the current training phase; None before the first one.
        figures: figures of the last logging interval, most important first. Those that do not fit are omitted.
        now: the current time.monotonic().
    """
    done, total, fields, seconds_left = *health.work, [health.describe()], health.seconds_left(now)
    if phase and health.phase == phase.name and health.activity in ("training", phase.name):
        step, epoch = int(health.values.get("step", 0)), int(health.values.get("epoch", 1))
        fields = [phase.name[:MAX_NAME_LENGTH], f"epoch {epoch}/{phase.last_epoch}"]
        done, total, seconds_left = step - phase.first_step, phase.steps, phase.seconds_left(step, now)
    elif phase and health.phase not in (START, FINISH):
        fields = [phase.name[:MAX_NAME_LENGTH], *fields]
    if total:
        bar_width = max(min(width // 8, 30), 5)
        full_width = min(bar_width * done // total, bar_width)
        fields += [BAR_FULL * full_width + BAR_EMPTY * (bar_width - full_width), f"{min(done / total, 1):4.0%}"]
        fields.append(f"left {'-:--' if seconds_left is None else format_duration(math.ceil(seconds_left))}")
    else:
        fields.append(format_duration(now - health.activity_began))
    line = "  ".join(fields)
    for figure in figures:
        if len(line) + 2 + len(figure) < width:
            line += f"  {figure}"
    return line[: width - 1]  # some terminals wrap a full line


class Display:
    """Shows a status line at the bottom of a terminal, below the log lines, until `stop` erases it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.phase: PhaseProgress | None = None
        self.figures: list[str] = []  # of the last logging interval, most important first
        self._live = Live(
            get_renderable=self._render, console=console, transient=True, refresh_per_second=REFRESHES_PER_SECOND
        )
        self._live.start()
        set_display(1 if console.is_terminal else None)

    def _render(self) -> Text:
        line = format_progress_line(self.console.width, self.phase, self.figures, time.monotonic())
        if not self.console.encoding.startswith("utf"):
            line = line.replace(BAR_FULL, "#").replace(BAR_EMPTY, "-")
        return Text(line, no_wrap=True, overflow="crop")

    def stop(self) -> None:
        """Erase the status line, and show it no more."""
        self._live.stop()
        set_display(None)
