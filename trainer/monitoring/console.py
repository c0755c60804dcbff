"""A console of rich for a terminal or a pipe whose reader may end first."""

from rich.console import Console

from trainer.monitoring.log import discard_if_closed


class PatientConsole(Console):
    """A console that discards what is printed once nobody reads it, where rich ends the process with code 1."""

    def on_broken_pipe(self) -> None:
        """Print nothing more; the command continues, as with a log that nobody reads."""
        self.quiet = True
        discard_if_closed(self.file)  # type: ignore[arg-type]
