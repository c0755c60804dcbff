"""The configuration of knowledge distillation: the teacher, and the run that trains it (docs/training.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import Field, WrapValidator, model_validator

from trainer.config.base import Address, InvalidValue, Section
from trainer.config.model import Model
from trainer.config.phases import AutoPhases, NamedPhases, Phase, validate_phases
from trainer.errors import TrainerError

TRAIN_TEACHER = "train"  # value of `distillation.teacher` with which the run trains its teacher first
TEACHER_FOLDER = "teacher"  # name of the folder in the student's output_dir that contains the teacher's run
Error = TypeVar("Error", bound=TrainerError)


def _validate_optional_phases(phases: Any, union: Callable[[Any], Any]) -> Any:
    return None if phases is None else validate_phases(phases, union)


OptionalPhases = Annotated[
    dict[str, Phase] | AutoPhases | None,
    WrapValidator(_validate_optional_phases, json_schema_input_type=NamedPhases | AutoPhases | None),
]


class Distillation(Section):
    """Knowledge distillation: loss = alpha x label loss + (1 - alpha) x temperature^2 x KL(teacher, student)."""

    teacher: Address
    """output_dir of an earlier run, or the folder of a SavedModel that a run exported. Local or in a bucket. train: the
    run trains its teacher first, in OUTPUT_DIR/teacher (docs/training.md)."""
    model: Model | None = None
    """teacher=train: the teacher's network, with the keys of `model`, or a name in the group `model`."""
    phases: OptionalPhases = None
    """teacher=train: the teacher's phases, with the keys of `phases`, or a name in the group `phases`; null: the same
    phases as the student's."""
    alpha: float = Field(0.1, ge=0, lt=1)
    """Weight of the loss against the labels; the loss against the teacher has the weight 1 - alpha."""
    temperature: float = Field(1.0, ge=0.01, le=1e3)
    """Number by which the logits of teacher and student are divided before the softmax; above 1 softens them."""

    @model_validator(mode="after")
    def _check_trained(self) -> Distillation:
        """Require a network for a teacher that the run trains, and no network or phases for any other teacher."""
        if self.teacher == TRAIN_TEACHER and self.model is None:
            fix = "set distillation.model to its network, or write ./train for a folder of this name"
            raise InvalidValue("is a teacher without a network", key="teacher", value=TRAIN_TEACHER, fix=fix)
        if self.teacher != TRAIN_TEACHER and (self.model is not None or self.phases is not None):
            problem = "is trained already, but distillation.model or distillation.phases is set"
            fix = "remove them, or set distillation.teacher=train"
            raise InvalidValue(problem, key="teacher", value=self.teacher, fix=fix)
        return self


def get_teacher_address(output_dir: str) -> str:
    """Return the output_dir of the teacher's run: OUTPUT_DIR/teacher for the student's `output_dir`."""
    return f"{output_dir.rstrip('/')}/{TEACHER_FOLDER}"


def prefix_teacher_key(error: Error) -> Error:
    """Change the key of an error in the teacher's configuration to the key that users write, and return the error.

    For example, "model.backbone" becomes "distillation.model.backbone".
    """
    if error.key and error.key.startswith(("model.", "phases.")):
        error.key = f"distillation.{error.key}"
    return error
