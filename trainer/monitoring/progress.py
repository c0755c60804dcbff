"""Show progress: a bar or log lines while images are written to shards, and log lines during slow activities."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trainer.monitoring.health import health
from trainer.monitoring.log import log, set_display_descriptor

ImageProgress = Callable[[int, int], None]  # arguments: number of images written so far, number of images to write
LOG_INTERVAL_SECONDS = 10.0  # minimum time between two log lines about written images
SLOW_SECONDS = 10.0  # default time until `log_while_slow` logs its first line


@contextmanager
def show_image_progress(style: str) -> Iterator[ImageProgress]:
    """Yield a function that shows the number of written images in a bar or in log lines.

    Lines are logged at most every `LOG_INTERVAL_SECONDS`, and once all images are written. Each change of the number is
    recorded in `health` as progress.

    Args:
        style: `runtime.progress`: "bar", "lines", or "auto", which is a bar if stdout is a terminal.
    """
    started_at = last_logged_at = time.monotonic()
    previous_count: int | None = None  # `done` of the last call
    logged_count: int | None = None  # `done` of the last log line

    def show_line(done: int, total: int) -> None:
        """Record progress, and log a line if the last line is old enough or all images are written."""
        nonlocal previous_count, last_logged_at, logged_count
        if done != previous_count:
            previous_count = done
            health.record_progress()
        now = time.monotonic()
        if done != logged_count and (done == total or now - last_logged_at >= LOG_INTERVAL_SECONDS):
            last_logged_at, logged_count = now, done
            message = f"wrote {done} of {total} images ({done / max(now - started_at, 1e-3):.0f}/s)"
            log.info(message, extra={"fields": {"done": done, "total": total}})

    if style != "bar" and (style != "auto" or not sys.stdout.isatty()):
        yield show_line
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as ProgressBar

    from trainer.monitoring.console import PatientConsole

    columns = TextColumn("writing images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with ProgressBar(*columns, console=PatientConsole()) as bar:
        task = bar.add_task("writing", total=None)

        def show_bar(done: int, total: int) -> None:
            """Record progress, and update the bar."""
            if done != bar.tasks[0].completed:
                health.record_progress()
            bar.update(task, completed=done, total=total)

        set_display_descriptor(1)  # the descriptor of stdout
        try:
            yield show_bar
        finally:
            set_display_descriptor(None)


@contextmanager
def log_while_slow(activity: str, first_log_seconds: float = SLOW_SECONDS) -> Iterator[None]:
    """Log that `activity` is still running, after `first_log_seconds`, and then after 2, 4, 8, ... times as long."""
    stopped = threading.Event()
    started_at = time.monotonic()

    def log_periodically() -> None:
        next_log_seconds = first_log_seconds
        while not stopped.wait(started_at + next_log_seconds - time.monotonic()):
            log.info(f"still {activity}, for {time.monotonic() - started_at:.0f} s")
            next_log_seconds *= 2

    thread = threading.Thread(target=log_periodically, name="log-while-slow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
