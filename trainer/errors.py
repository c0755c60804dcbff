"""The errors that are explained to the user, and the exit codes of the process."""

DONE = 0
BUG = 1
WRONG_INPUT = 2
GAVE_UP = 3
DRIFTED = 4
INTERRUPTED = 75


class TrainerError(Exception):
    """A failure we can explain. The message is one clear sentence: what, where, what to do."""

    exit_code = BUG


class ConfigError(TrainerError):
    """The configuration is wrong; trying again cannot help."""

    exit_code = WRONG_INPUT


class DataError(TrainerError):
    """The data is missing, damaged or contradicts the configuration."""

    exit_code = WRONG_INPUT


class ModelError(TrainerError):
    """The backbone, its weights or a freezing rule cannot be had as asked."""

    exit_code = WRONG_INPUT


class Diverged(TrainerError):
    """The loss is no longer a finite number; the same run would diverge again."""

    exit_code = WRONG_INPUT


class Interrupted(TrainerError):
    """Stopped from outside with everything saved: start the same command again and it goes on."""

    exit_code = INTERRUPTED


class StopRequested(Interrupted):
    """Stopped by a signal, here or on another worker."""


class GaveUp(TrainerError):
    """Started again and again without a step of progress."""

    exit_code = GAVE_UP


class Drifted(TrainerError):
    """The images or predictions of a model have shifted from its test split: an answer, not a failure."""

    exit_code = DRIFTED
