"""The teacher of a run that distils: found, checked against the data, and asked once where that is enough."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import schema as config
from trainer.distillation.source import (
    ROWS,
    SAVED_MODEL,
    TeacherFiles,
    check_classes,
    check_same,
    look_for_teacher,
    read_teacher,
    write_saved_model,
)
from trainer.distillation.teacher import Teacher, classifier_as_teacher, saved_model_as_teacher
from trainer.evaluation.scoring import EvaluationPass
from trainer.monitoring.health import signs
from trainer.rebuilding import rebuild_classifier
from trainer.run import Run, from_chief, say, score
from trainer.runs.checkpoints import packed, unpacked
from trainer.storage.local import write_whole

_FORMAT = 1  # of the kept answers; counts up when they change


def find_teacher(job: Run) -> None:
    """Open the teacher where one is configured and something is left to train.

    Where every epoch shows the same images, it answers for each of them now, on all workers, and batches hold its
    answers from then on; else it answers in every step. Told to stop meanwhile, the job has no teacher: ask
    `told_to_stop` before a step.

    Raises:
        DataError: there is no teacher, it knows other classes, or it is not the one that this run began with.
    """
    told = job.config.distillation
    if told is None or job.state.phase >= len(job.config.phases):
        return
    signs.at("opening the teacher")
    found = look_for_teacher(told.teacher) if job.peers.is_chief else None
    facts: dict[str, Any] = job.peers.told("teacher", lambda: _facts(found))
    check_classes(told.teacher, tuple(facts["classes"]), job.dataset.class_names)
    check_same(job.address, job.state.teacher, facts["fingerprint"])
    job.state.teacher = facts["fingerprint"]
    say(f"teacher: {facts['words']}; loss = {told.alpha:g} x label + {1 - told.alpha:g} x KL(teacher, student)"
        + (f" at temperature {told.temperature:g}" if told.temperature != 1 else ""))  # fmt: skip
    if job.config.augmentation.active:
        job.teacher = _open(job, found, facts)
        say("  it answers in every step, for what augmentation made of the images")
    else:
        job.answers = _answers(job, found, facts)


def _facts(found: TeacherFiles | None) -> dict[str, Any]:
    assert found is not None
    model = found.model.model_dump(mode="json") if found.model else None
    return {"kind": found.kind, "classes": found.classes, "fingerprint": found.fingerprint, "words": found.words,
            "model": model}  # fmt: skip


def _open(job: Run, found: TeacherFiles | None, facts: dict[str, Any]) -> Teacher:
    """Build it on every worker; the chief alone reads it."""
    assert job.config.distillation
    address = job.config.distillation.teacher
    arrays = from_chief(job, "teacher's weights", read_teacher(found) if found else {})
    if facts["kind"] == SAVED_MODEL:
        with job.strategy.scope(), tempfile.TemporaryDirectory(prefix="kubetune-teacher-") as folder:
            write_saved_model(arrays, Path(folder))
            return saved_model_as_teacher(Path(folder), address)
    classes, source = len(job.dataset.class_names), f"distillation.teacher={address}"
    model = config.Model(**facts["model"])
    return classifier_as_teacher(
        rebuild_classifier(model, classes, job.config.seed, arrays, source, job.strategy.scope())
    )


def _answers(job: Run, found: TeacherFiles | None, facts: dict[str, Any]) -> np.ndarray | None:
    """The teacher's probabilities for every training example, float32 [count, classes], from the cache where an earlier
    start left them; None where the run was told to stop meanwhile.

    It sees the images at its own size, and at its own `resize` where that is known.
    """
    split, classes = job.dataset.splits["train"], len(job.dataset.class_names)
    resize = facts["model"]["resize"] if facts["model"] else job.config.model.resize
    key = (_FORMAT, facts["fingerprint"], job.dataset.fingerprint, split.count, resize, job.config.runtime.precision)
    digest = hashlib.sha256("\n".join(map(str, key)).encode()).hexdigest()[:16]
    file = Path(job.config.runtime.cache_dir).expanduser() / "teachers" / f"{digest}.npz"
    kept = _kept(file, (split.count, classes)) if job.peers.is_chief else None
    if job.peers.told("teacher's answers kept", lambda: kept is not None):
        say(f"  its answers: taken from {file}, made by an earlier start")
        return from_chief(job, "teacher's answers", {"answers": kept} if kept is not None else {})["answers"]
    teacher = _open(job, found, facts)
    signs.at("the teacher's answers")
    say(f"  it answers for {split.count:,} training images at {teacher.image_size} px, once; kept in {file}")
    if (teacher.image_size, resize) == (job.classifier.image_size, job.config.model.resize):
        pixels = job.pixels("train")
    else:
        pixels = job.pixels_at("train", teacher.image_size, resize, "none")
    scored, _, indices = score(
        job, EvaluationPass(job.strategy, teacher), pixels, ROWS * job.replicas * job.peers.size, "teacher's answers"
    )
    if job.told_to_stop("while the teacher answered"):
        return None
    answers = np.full((split.count, classes), 1 / classes, np.float32)  # of what cannot be decoded: it counts nowhere
    answers[indices] = scored
    answers = from_chief(job, "teacher's answers", {"answers": answers})["answers"]
    if job.peers.is_chief:
        try:
            write_whole(file, packed({"answers": answers}))
        except OSError as error:
            say(f"  they cannot be kept in {file.parent} ({error.strerror}); another start will ask again")
    return answers


def _kept(file: Path, shape: tuple[int, int]) -> np.ndarray | None:
    try:
        answers = unpacked(file.read_bytes())["answers"]
    except (OSError, ValueError, KeyError):
        return None
    return answers if answers.shape == shape and answers.dtype == np.float32 else None
