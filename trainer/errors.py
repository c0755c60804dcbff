"""Errors that are explained to the user, and the exit codes of the process."""

from collections.abc import Iterable

DONE = 0
BUG = 1
WRONG_INPUT = 2
GAVE_UP = 3
DRIFTED = 4
INTERRUPTED = 75


class TrainerError(Exception):
    """A failure with an explanation: `KEY=VALUE: problem; fix`.

    Attributes:
        problem: what is wrong, and where.
        key: the configuration key, command-line argument or environment variable at fault; None where there is none.
        value: the value of `key`; None leaves it out of the message.
        fix: what the user can do.
    """

    exit_code = BUG

    def __init__(self, problem: str, *, key: str | None = None, value: object = None, fix: str | None = None) -> None:
        super().__init__(problem)
        self.problem, self.key, self.value, self.fix = problem, key, value, fix

    def __str__(self) -> str:
        subject = "" if self.key is None else f"{self.key}: " if self.value is None else f"{self.key}={self.value}: "
        return subject + self.problem + (f"; {self.fix}" if self.fix else "")


class ConfigError(TrainerError):
    """The configuration is wrong; another try cannot help.

    Attributes:
        faults: all errors of a configuration with several, each with key, value, problem and fix.
    """

    exit_code = WRONG_INPUT
    faults: tuple[TrainerError, ...] = ()

    @classmethod
    def of_faults(cls, faults: Iterable[TrainerError], subject: str = "the configuration") -> "ConfigError":
        """The error that lists these, one per line."""
        listed = tuple(faults)
        lines = "\n".join(f"  {fault}" for fault in listed)
        error = cls(f"{subject} has {len(listed)} fault{'s' * (len(listed) > 1)}:\n{lines}")
        error.faults = listed
        return error


class DataError(TrainerError):
    """The data is missing, damaged or contradicts the configuration."""

    exit_code = WRONG_INPUT


class ModelError(TrainerError):
    """The backbone, its weights or a freezing rule cannot be used as configured."""

    exit_code = WRONG_INPUT


class Diverged(TrainerError):
    """The loss is no longer a finite number; the same run would diverge again."""

    exit_code = WRONG_INPUT


class Interrupted(TrainerError):
    """Stopped from outside with everything saved; the same command resumes."""

    exit_code = INTERRUPTED


class StopRequested(Interrupted):
    """Stopped by a signal, here or on another worker."""


class GaveUp(TrainerError):
    """Restarted too often without progress."""

    exit_code = GAVE_UP


class Drifted(TrainerError):
    """The images or predictions of a served model have shifted from its reference: a result, not a failure."""

    exit_code = DRIFTED
