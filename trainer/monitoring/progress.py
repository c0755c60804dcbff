"""The progress of writing images, as a bar on a terminal or as lines of a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from trainer.monitoring.health import health
from trainer.monitoring.log import log

Progress = Callable[[int, int], None]  # what is done, of how many


@contextmanager
def written_images(kind: str) -> Iterator[Progress]:
    """A function that shows how many images are written: a live bar, else a line every ten seconds and at the end.

    Each call with more of them done counts as progress of the process.

    Args:
        kind: as `runtime.progress`; "auto": a bar where stdout is a terminal.
    """
    start = last = time.monotonic()
    before = said = -1

    def line(done: int, total: int) -> None:
        nonlocal last, said
        now = time.monotonic()
        if done != said and (done == total or now - last >= 10):
            last, said = now, done
            text = f"wrote {done} of {total} images ({done / max(now - start, 1e-3):.0f}/s)"
            log.info(text, extra={"fields": {"done": done, "total": total}})

    with ExitStack() as stack:
        show = line
        if kind == "bar" or (kind == "auto" and sys.stdout.isatty()):
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = TextColumn("writing images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            bar = stack.enter_context(Bar(*columns))
            task = bar.add_task("writing", total=None)

            def show(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

        def progress(done: int, total: int) -> None:
            nonlocal before
            if done != before:
                before = done
                health.progress()
            show(done, total)

        yield progress
