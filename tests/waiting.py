"""Wait for events, not for seconds: on a busy machine, everything takes longer."""

import subprocess
import time
from collections.abc import Callable
from typing import Any, TypeVar

# Seconds until an event that has not occurred is a failure; pytest itself ends a quick test after 300 s.
PATIENCE = 240.0
INTERVAL_SECONDS = 0.01

Result = TypeVar("Result")


def wait_until(
    condition: Callable[[], Result],
    what: str | Callable[[], object] = "",
    seconds: float = PATIENCE,
    process: subprocess.Popen[Any] | None = None,
) -> Result:
    """Call `condition` until its result is true, and return the result.

    Args:
        condition: called every few milliseconds, at least once.
        what: what it waits for, or a function that returns this once it fails, such as the output so far.
        seconds: the condition must be true within this time.
        process: a process without which the condition cannot become true; its end is a failure at once.

    Raises:
        AssertionError: the time is over, or the process has ended.
    """
    deadline = time.monotonic() + seconds
    while True:
        # Both are read before the condition, which is called once more after the deadline and the end of the process.
        is_over, code = time.monotonic() > deadline, process.poll() if process else None
        if result := condition():
            return result
        if is_over or code is not None:
            problem = f"not within {seconds:g} s" if code is None else f"the process has ended with {code}"
            raise AssertionError(f"{problem}: {what() if callable(what) else what}")
        time.sleep(INTERVAL_SECONDS)
