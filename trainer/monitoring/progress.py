"""Progress of writing images: a bar on a terminal, or log lines."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trainer.monitoring.health import health
from trainer.monitoring.log import log

Progress = Callable[[int, int], None]  # images written so far, and in total


@contextmanager
def written_images(kind: str) -> Iterator[Progress]:
    """Yield a function that shows how many images are written: a bar, or a log line every ten seconds and at the end.

    Each call with more images counts as progress of the process.

    Args:
        kind: as `runtime.progress`; "auto": a bar if stdout is a terminal.
    """
    start = last = time.monotonic()
    before = logged = -1

    def show_line(done: int, total: int) -> None:
        nonlocal before, last, logged
        if done != before:
            before = done
            health.progress()
        now = time.monotonic()
        if done != logged and (done == total or now - last >= 10):
            last, logged = now, done
            text = f"wrote {done} of {total} images ({done / max(now - start, 1e-3):.0f}/s)"
            log.info(text, extra={"fields": {"done": done, "total": total}})

    if kind != "bar" and (kind != "auto" or not sys.stdout.isatty()):
        yield show_line
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    with Bar(TextColumn("writing images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("writing", total=None)

        def show_bar(done: int, total: int) -> None:
            if done != bar.tasks[0].completed:
                health.progress()
            bar.update(task, completed=done, total=total)

        yield show_bar
