"""A rich console for a terminal or a pipe whose reader may exit before the command does."""

from rich.console import Console

from trainer.monitoring.log import discard_if_closed


class PatientConsole(Console):
    """A rich console that discards its output once the pipe's reader has exited. Rich would exit with code 1."""

    def on_broken_pipe(self) -> None:
        """Discard all further output, so that the command continues. Rich calls this after a BrokenPipeError."""
        self.quiet = True
        discard_if_closed(self.file)  # type: ignore[arg-type]
