"""A console of rich for a terminal or a pipe whose reader may end before the command."""

from rich.console import Console

from trainer.monitoring.log import discard_if_closed


class PatientConsole(Console):
    """A console that discards its output once the reader of the pipe has ended. Rich would exit with code 1."""

    def on_broken_pipe(self) -> None:
        """Print nothing more, so that the command continues, as it does if nothing reads its log."""
        self.quiet = True
        discard_if_closed(self.file)  # type: ignore[arg-type]
