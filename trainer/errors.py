"""Errors that are reported to the user without a traceback, and the exit codes of the process."""

from collections.abc import Iterable

from trainer.names import escape_unprintable

# Exit codes. A podFailurePolicy in k8s/ ends the Job after 2 and 3, and restarts the pod after 75.
DONE = 0
BUG = 1  # an unexpected exception
WRONG_INPUT = 2  # the configuration or data is invalid: the same command fails again
GAVE_UP = 3  # the run was restarted too often without progress
DRIFTED = 4  # result of trainer.drift, not a failure: images or predictions have shifted
NOT_PROMOTED = 5  # result of trainer.promote, not a failure: the run is worse than the served version
UNREADABLE = 6  # result of trainer.predict, not a failure: some images cannot be read
INTERRUPTED = 75  # stopped by an external cause: the same command resumes; EX_TEMPFAIL of sysexits.h


def format_count(count: int, singular: str, plural: str | None = None) -> str:
    """Format a count with its noun, like "1 image" or "2,000 images"."""
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"


class TrainerError(Exception):
    """A failure that is printed as `KEY=VALUE: problem; fix` instead of a traceback.

    Attributes:
        problem: what is wrong: a predicate of `KEY=VALUE` ("is not a duration") or a sentence.
        key: configuration key, command-line argument or environment variable that has the problem; None if there is
            none.
        value: value of `key`; None omits it from the message.
        fix: what the user can do; None if there is no advice.
        exit_code: exit code of the process.
    """

    exit_code = BUG

    def __init__(self, problem: str, *, key: str | None = None, value: object = None, fix: str | None = None) -> None:
        super().__init__(problem)
        self.problem, self.key, self.value, self.fix = problem, key, value, fix

    def __str__(self) -> str:
        value = "" if self.value is None else f"={escape_unprintable(str(self.value))}"
        subject = "" if self.key is None else f"{self.key}{value}: "
        return subject + self.problem + (f"; {self.fix}" if self.fix else "")


class ConfigError(TrainerError):
    """The configuration, an argument or an environment variable is wrong. The same command fails again.

    Attributes:
        errors: the errors that this error lists; empty if it describes a single problem.
    """

    exit_code = WRONG_INPUT
    errors: tuple[TrainerError, ...] = ()

    @classmethod
    def combine(cls, errors: Iterable[TrainerError], subject: str = "the configuration") -> "ConfigError":
        """Build an error that lists `errors`, one per line. Its first line is "SUBJECT has N errors:"."""
        listed_errors = tuple(errors)
        lines = "\n".join(f"  {error}" for error in listed_errors)
        combined = cls(f"{subject} has {format_count(len(listed_errors), 'error')}:\n{lines}")
        combined.errors = listed_errors
        return combined


class DataError(TrainerError):
    """The data is missing or corrupt, or contradicts the configuration."""

    exit_code = WRONG_INPUT


class NoPredictions(DataError):
    """The prediction log of a served model has no predictions in the period."""


class ModelError(TrainerError):
    """The backbone, its weights, a freezing rule or an export cannot be used as configured."""

    exit_code = WRONG_INPUT


class Diverged(TrainerError):
    """The loss is not finite, or too large for a classifier that learns. The same run would diverge again."""

    exit_code = WRONG_INPUT


class Interrupted(TrainerError):
    """The command was stopped by an external cause: a lost worker, unavailable storage. The same command resumes."""

    exit_code = INTERRUPTED


class StopRequested(Interrupted):
    """The command stopped because of a signal to this or another worker."""


class GaveUp(TrainerError):
    """The run was restarted too often without progress."""

    exit_code = GAVE_UP


class Drifted(TrainerError):
    """The images or predictions of a served model have shifted from its reference. A result, not a failure."""

    exit_code = DRIFTED


class NotPromoted(TrainerError):
    """A model is not promoted, because it is worse than the served model. A result, not a failure."""

    exit_code = NOT_PROMOTED


class SomeUnreadable(TrainerError):
    """Some of the images to predict cannot be read. The others are predicted. A result, not a failure."""

    exit_code = UNREADABLE
