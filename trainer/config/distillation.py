"""The configuration of a teacher, and of the run that trains it (docs/training.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import Field, WrapValidator, model_validator

from trainer.config.base import Address, InvalidValue, Section
from trainer.config.model import Model
from trainer.config.phases import AutoPhases, NamedPhases, Phase, validate_phases
from trainer.errors import TrainerError

TRAIN = "train"  # value of `distillation.teacher`: the run trains it first
FOLDER = "teacher"  # in output_dir, of the run that trains it
Error = TypeVar("Error", bound=TrainerError)


def _validate_optional_phases(phases: Any, union: Callable[[Any], Any]) -> Any:
    return None if phases is None else validate_phases(phases, union)


OptionalPhases = Annotated[
    dict[str, Phase] | AutoPhases | None,
    WrapValidator(_validate_optional_phases, json_schema_input_type=NamedPhases | AutoPhases | None),
]


class Distillation(Section):
    """A teacher: loss = alpha x loss of the label + (1 - alpha) x temperature^2 x KL(teacher, student)."""

    teacher: Address
    """output_dir of an earlier run, or the folder of a SavedModel that a run exported. Local or in a bucket. train: the
    run trains it first, in OUTPUT_DIR/teacher (docs/training.md)."""
    model: Model | None = None
    """teacher=train: its network, with the keys of `model`, or the name of one of the group `model`."""
    phases: OptionalPhases = None
    """teacher=train: its phases, with the keys of `phases`, or a name of the group `phases`; null: those of the run."""
    alpha: float = Field(0.1, ge=0, lt=1)
    """Weight of the loss with the labels as targets."""
    temperature: float = Field(1.0, ge=0.01, le=1e3)
    """Temperature that softens the predictions of teacher and student."""

    @model_validator(mode="after")
    def _check_trained(self) -> Distillation:
        if self.teacher == TRAIN and self.model is None:
            fix = "set distillation.model to its network, or write ./train for a folder of this name"
            raise InvalidValue("is a teacher without a network", key="teacher", value=TRAIN, fix=fix)
        if self.teacher != TRAIN and (self.model is not None or self.phases is not None):
            problem = "is trained already, but distillation.model or distillation.phases is set"
            fix = "remove them, or set distillation.teacher=train"
            raise InvalidValue(problem, key="teacher", value=self.teacher, fix=fix)
        return self


def teacher_address(output_dir: str) -> str:
    """Return the output_dir of the run that trains the teacher of the run in `output_dir`."""
    return f"{output_dir.rstrip('/')}/{FOLDER}"


def name_key_of_teacher(error: Error) -> Error:
    """Name the key of an error in the run of a teacher as it is written in the command, and return the error."""
    if error.key and error.key.startswith(("model.", "phases.")):
        error.key = f"distillation.{error.key}"
    return error
