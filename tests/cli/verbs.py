"""The verbs of the command line in this process."""

import signal
import sys
from collections.abc import Callable

import pytest


def exit_code_of(main: Callable[[], None], *arguments: str) -> int:
    """The exit code of a verb with these arguments; the handler of SIGTERM, which it removes, is restored."""
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
