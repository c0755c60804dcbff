"""A rich console for a terminal or a pipe whose reader may exit before the command does, and the width of its lines."""

import shutil
import sys

from rich.console import Console

from trainer.monitoring.log import discard_if_closed


class PatientConsole(Console):
    """A rich console that discards its output once the pipe's reader has exited. Rich would exit with code 1."""

    def on_broken_pipe(self) -> None:
        """Discard all further output, so that the command continues. Rich calls this after a BrokenPipeError."""
        self.quiet = True
        discard_if_closed(self.file)  # type: ignore[arg-type]


def get_width(default: int) -> int:
    """Return the characters per line of stdout: of the terminal, or $COLUMNS, which precedes it, or else `default`."""
    return Console().width if sys.stdout.isatty() else shutil.get_terminal_size((default, 24)).columns
