"""The status line at the bottom of a terminal: phase, epoch, progress bar, time left, and as many metrics as fit."""

import math
import time
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.text import Text

from trainer.monitoring.health import FINISH, START, health
from trainer.monitoring.log import set_display_descriptor

REFRESHES_PER_SECOND = 4
MAX_NAME_LENGTH = 24  # maximum number of characters of a phase's name; longer names are truncated
BAR_FULL, BAR_EMPTY = "━", "╌"  # characters of the progress bar


def format_duration(seconds: float) -> str:
    """Format a number of seconds as M:SS or H:MM:SS: "1:15" for 75, "1:01:40" for 3700."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


@dataclass(frozen=True)
class PhaseProgress:
    """The first step and the length of a training phase, and when this process entered the phase."""

    name: str
    first_step: int  # number of steps that the run takes before the phase
    steps: int  # maximum length of the phase, in steps
    last_epoch: int  # epoch of the run in which the phase ends, counted from 1
    start_step: int  # step of the run at which this process entered the phase
    started_at: float = field(default_factory=time.monotonic)  # time.monotonic() at `start_step`

    def seconds_left(self, step: int, now: float) -> float | None:
        """Estimate the seconds until the phase ends, including validation, from the speed in this process.

        Returns None if this process has not yet completed a step of the phase. `step` is the run's current step, and
        `now` is the current time.monotonic().
        """
        steps_done, steps_left = step - self.start_step, self.first_step + self.steps - step
        return (now - self.started_at) / steps_done * steps_left if steps_done > 0 else None


def format_status_line(width: int, phase: PhaseProgress | None, metric_texts: list[str], now: float) -> str:
    """Format the status line from `phase` and the global `health`.

    While the phase is training, the bar shows the phase's progress, otherwise the progress of the current activity.
    With 80 or more columns, no field of a training phase is truncated.

    Args:
        width: number of columns of the terminal.
        phase: the current training phase; None before the first one.
        metric_texts: formatted metrics, most important first. Those that do not fit are omitted.
        now: the current time.monotonic().
    """
    done, total, fields, seconds_left = *health.work, [health.describe()], health.seconds_left(now)
    if phase and health.phase == phase.name and health.activity in ("training", phase.name):
        step, epoch = int(health.values.get("step", 0)), int(health.values.get("epoch", 1))
        fields = [phase.name[:MAX_NAME_LENGTH], f"epoch {epoch}/{phase.last_epoch}"]
        done = step - phase.first_step
        total = phase.steps
        seconds_left = phase.seconds_left(step, now)
    elif phase and health.phase not in (START, FINISH):
        fields = [phase.name[:MAX_NAME_LENGTH], *fields]
    if total:
        bar_width = max(min(width // 8, 30), 5)
        filled_width = min(bar_width * done // total, bar_width)
        fields += [BAR_FULL * filled_width + BAR_EMPTY * (bar_width - filled_width), f"{min(done / total, 1):4.0%}"]
        fields.append(f"left {'-:--' if seconds_left is None else format_duration(math.ceil(seconds_left))}")
    else:
        fields.append(format_duration(now - health.activity_started_at))
    line = "  ".join(fields)
    for text in metric_texts:
        if len(line) + 2 + len(text) < width:
            line += f"  {text}"
    return line[: width - 1]  # some terminals wrap a full line


class Display:
    """Shows a status line below a terminal's log lines. A background thread refreshes it until `stop` erases it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.phase: PhaseProgress | None = None
        self.metric_texts: list[str] = []  # formatted metrics of the last logging interval, most important first
        self._live = Live(
            get_renderable=self._render, console=console, transient=True, refresh_per_second=REFRESHES_PER_SECOND
        )
        self._live.start()
        set_display_descriptor(1 if console.is_terminal else None)  # 1: the descriptor of stdout

    def _render(self) -> Text:
        line = format_status_line(self.console.width, self.phase, self.metric_texts, time.monotonic())
        if not self.console.encoding.startswith("utf"):
            line = line.replace(BAR_FULL, "#").replace(BAR_EMPTY, "-")
        return Text(line, no_wrap=True, overflow="crop")

    def stop(self) -> None:
        """Erase the status line and stop refreshing it."""
        self._live.stop()
        set_display_descriptor(None)
