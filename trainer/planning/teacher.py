"""The teacher of a run that has not begun: whether that run could open it, and what it takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainer.config.schema import Model, RunConfig
from trainer.distillation.source import ROWS, TeacherFiles, check_classes, check_same, look_for_teacher, read_teacher
from trainer.distillation.teacher import saved_model_as_teacher
from trainer.models.classifier import build_classifier
from trainer.planning import checks as rehearsal
from trainer.planning.estimates import activation_bytes, bytes_of, parameters
from trainer.storage.staging import is_remote
from trainer.training import variables
from trainer.types import Dataset


@dataclass(frozen=True)
class TeacherPlan:
    """A teacher; sizes in bytes, activations of one replica (0 of a SavedModel: they are not known)."""

    words: str
    variables: int
    activations: int
    answers: int  # that a worker keeps; 0 where the teacher answers in every step

    def memory_rows(self, replicas: int) -> list[tuple[str, int]]:
        """What it takes of memory, every replica of a worker counted."""
        rows = [("the teacher's variables", self.variables * replicas)]
        rows += [("its activations", self.activations * replicas)] if self.activations else []
        return [*rows, ("its answers", self.answers)] if self.answers else rows


def plan_teacher(config: RunConfig, dataset: Dataset, rows: int) -> TeacherPlan | None:
    """Open the teacher as a run would, but for what lies in a bucket: of that no weights are read.

    Args:
        rows: training examples that a replica computes at once.

    Raises:
        DataError, ConfigError, ModelError: as a run would.
    """
    told = config.distillation
    if told is None:
        return None
    found = look_for_teacher(told.teacher)
    check_classes(told.teacher, found.classes, dataset.class_names)
    begun = rehearsal.newest_state(config) if config.output_dir else None
    check_same(str(config.output_dir), begun.get("teacher") if begun else None, found.fingerprint)
    every_step, count = config.augmentation.active, dataset.splits["train"].count
    answers = 0 if every_step else count * len(found.classes) * 4
    how = "answers in every step" if every_step else f"answers once, for {count:,} training images"
    if found.model is None:
        size = _saved_model(told.teacher, found)
        return TeacherPlan(f"a SavedModel, {size / 1e6:,.1f} MB of weights; {how}", size, 0, answers)
    model = Model(**found.model.model_dump() | {"weights": "none"})  # each of its values is in the checkpoint
    classifier = build_classifier(model, len(found.classes), config.seed)
    if not is_remote(told.teacher):
        variables.write(classifier.variables, read_teacher(found), f"distillation.teacher={told.teacher}")
    words = f"{model.backbone} at {classifier.image_size} px, {parameters(classifier):,} parameters; {how}"
    activations = activation_bytes(classifier, None, rows if every_step else ROWS)
    return TeacherPlan(words, bytes_of(classifier.variables.values()), activations, answers)


def _saved_model(address: str, found: TeacherFiles) -> int:
    """Bytes of its variables, after a look at its signature where it is here."""
    if not is_remote(address):
        saved_model_as_teacher(Path(str(found.home)), address)
    return sum(size for name, size in found.files.items() if name.startswith("variables/"))
