"""Run the commands of the command line in this process."""

import signal
import sys
from collections.abc import Callable

import pytest


def exit_code_of(main: Callable[[], None], *arguments: str) -> int:
    """Run a command with these arguments, and return its exit code. Restore the SIGTERM handler, which it replaces."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["trainer", *arguments])
            with pytest.raises(SystemExit) as stop:
                main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert isinstance(stop.value.code, int)
    return stop.value.code
