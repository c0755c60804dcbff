"""Progress display for writing images, as a bar on a terminal or as log lines."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trainer.monitoring.health import health
from trainer.monitoring.log import log, set_display

ShowProgress = Callable[[int, int], None]  # arguments: numbers of written images and of all images


@contextmanager
def show_image_progress(kind: str) -> Iterator[ShowProgress]:
    """Yield a function that shows the number of written images in a bar, or in a log line every ten seconds.

    It is a bar if `kind` (`runtime.progress`) is "bar", or "auto" and stdout is a terminal. A call with a new number
    counts as progress of the process (`health`).
    """
    start = last_logged = time.monotonic()
    previous = logged = -1

    def show_line(done: int, total: int) -> None:
        nonlocal previous, last_logged, logged
        if done != previous:
            previous = done
            health.record_progress()
        now = time.monotonic()
        if done != logged and (done == total or now - last_logged >= 10):
            last_logged, logged = now, done
            text = f"wrote {done} of {total} images ({done / max(now - start, 1e-3):.0f}/s)"
            log.info(text, extra={"fields": {"done": done, "total": total}})

    if kind != "bar" and (kind != "auto" or not sys.stdout.isatty()):
        yield show_line
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as ProgressBar

    from trainer.monitoring.console import PatientConsole

    columns = TextColumn("writing images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with ProgressBar(*columns, console=PatientConsole()) as bar:
        task = bar.add_task("writing", total=None)

        def show_bar(done: int, total: int) -> None:
            if done != bar.tasks[0].completed:
                health.record_progress()
            bar.update(task, completed=done, total=total)

        set_display(1)
        try:
            yield show_bar
        finally:
            set_display(None)


SLOW_SECONDS = 10.0  # after which `log_while_slow` logs for the first time


@contextmanager
def log_while_slow(activity: str, after: float = SLOW_SECONDS) -> Iterator[None]:
    """Log that `activity` lasts, after that many seconds, then after twice as many, four times as many, and so on."""
    ended, began = threading.Event(), time.monotonic()

    def log_periodically() -> None:
        due = after
        while not ended.wait(began + due - time.monotonic()):
            log.info(f"still {activity}, for {time.monotonic() - began:.0f} s")
            due *= 2

    thread = threading.Thread(target=log_periodically, name="slow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
