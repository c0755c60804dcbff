"""The teacher of a run that distils (Hinton et al. 2015): opened, checked against the data, and run once where that is
enough.
"""

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.arrays import pack, unpack
from trainer.cluster.worker import Worker
from trainer.config.schema import Model
from trainer.data.decoding import plain
from trainer.data.images import ImageStore
from trainer.data.sharding import Sharding
from trainer.distillation import source
from trainer.distillation.source import ROWS, SAVED_MODEL, check_classes, check_same
from trainer.errors import DataError
from trainer.evaluation.scoring import Scorer
from trainer.models.classifier import Classifier
from trainer.monitoring.health import health
from trainer.monitoring.log import log
from trainer.runs.finished_run import rebuild_classifier
from trainer.storage.local import write_whole
from trainer.training.losses import log_probs


@dataclass(frozen=True)
class Teacher:
    """A network for inference; S is the side of the images it was trained on, pixels."""

    image_size: int
    answer: Callable[[Any], Any]  # float32 [b, S, S, 3] in 0..255 -> float32 [b, classes]

    def logits(self, images: Any, *, training: bool = False) -> tf.Tensor:  # noqa: ARG002 - it never trains
        """uint8 or float32 [b, s, s, 3] in 0..255 -> float32 [b, classes], up to a constant of each row; no gradient.

        Images of another side are resized to S (bilinear). Normalisation and dropout are those of inference.
        """
        pixels = tf.cast(images, tf.float32)
        if pixels.shape[1] != self.image_size:
            pixels = tf.image.resize(pixels, [self.image_size, self.image_size])
        return tf.stop_gradient(self.answer(pixels))


def classifier_as_teacher(classifier: Classifier) -> Teacher:
    """The teacher that a classifier with its trained weights is."""
    return Teacher(classifier.image_size, lambda images: classifier.logits(images, training=False))


def saved_model_as_teacher(folder: Path, address: str) -> Teacher:
    """The teacher that an exported SavedModel is (`trainer/exporting/saved_model.py`).

    Call it under the strategy's scope; `address` is for messages.

    Raises:
        DataError: it has no signature `images` that answers `probabilities` for images of one size.
    """
    loaded = tf.saved_model.load(str(folder))
    signature = loaded.signatures.get("images")
    given = signature.structured_input_signature[1].get("images") if signature else None
    if given is None or "probabilities" not in signature.structured_outputs or not given.shape[1]:
        raise DataError(
            f"distillation.teacher={address} has no signature `images` that answers `probabilities`; give "
            "export/saved_model/1 of a run, or its output_dir"
        )

    def answer(images: Any) -> Any:
        assert loaded is not None  # its variables live as long as it does
        return log_probs(signature(images=images)["probabilities"])

    return Teacher(int(given.shape[1]), answer)


# ---------------------------------------------------------------------------------------------------------------
# The teacher of a run

_FORMAT = 1  # of the cached answers; counts up when they change


@dataclass(frozen=True)
class OpenedTeacher:
    """The teacher of a run: it answers in every step (`network`), or has answered for every training example.

    Both are None where the run was asked to stop meanwhile.
    """

    fingerprint: str  # of its weights
    network: Teacher | None = None
    answers: np.ndarray | None = None  # its probabilities, float32 [count, classes], by example index

    def with_answers(self, batches: tf.data.Dataset) -> tf.data.Dataset:
        """Training batches that hold the answers for their examples, as `teacher`, where they are known."""
        if self.answers is None:
            return batches
        answers = tf.constant(self.answers)
        return batches.map(plain(lambda batch: {**batch, "teacher": tf.gather(answers, batch["index"])}))


def open_teacher(worker: Worker, images: ImageStore, sharding: Sharding, run: str, before: str | None) -> OpenedTeacher:
    """Open the teacher that a configuration names, on all workers; the chief alone reads it.

    Where every epoch shows the same images, it answers for each of them now, and batches hold its answers from then on;
    else it answers in every step. Ask `Worker.should_stop` after it.

    Args:
        run: the output_dir of the student, for messages.
        before: fingerprint of the teacher that this run began with; None: it begins now.

    Raises:
        DataError: there is no teacher, it knows other classes, or it is not the one that this run began with.
    """
    config = images.config
    assert config.distillation
    address, alpha, temperature = (getattr(config.distillation, key) for key in ("teacher", "alpha", "temperature"))
    files = source.find_teacher(address) if worker.is_chief else None
    facts: dict[str, Any] = worker.control.broadcast("teacher", lambda: files.facts if files else None)
    check_classes(address, tuple(facts["classes"]), images.dataset.class_names)
    check_same(run, before, facts["fingerprint"])
    log.info(f"teacher: {facts['words']}; loss = {alpha:g} x label + {1 - alpha:g} x KL(teacher, student)"
        + (f" at temperature {temperature:g}" if temperature != 1 else ""))  # fmt: skip

    def build() -> Teacher:
        arrays = worker.control.broadcast_arrays("teacher's weights", source.read_teacher(files) if files else {})
        return _build(worker.strategy, images, address, facts, arrays)

    if config.augmentation.active:
        network = build()
        log.info("  it answers in every step, for what augmentation made of the images")
        return OpenedTeacher(facts["fingerprint"], network=network)
    return OpenedTeacher(facts["fingerprint"], answers=_answers(worker, images, sharding, facts, build))


def _build(
    strategy: tf.distribute.Strategy, images: ImageStore, address: str, facts: dict[str, Any], arrays: dict[str, Any]
) -> Teacher:
    if facts["kind"] == SAVED_MODEL:
        with strategy.scope(), tempfile.TemporaryDirectory(prefix="kubetune-teacher-") as folder:
            source.write_saved_model(arrays, Path(folder))
            return saved_model_as_teacher(Path(folder), address)
    model, setting = Model(**facts["model"]), f"distillation.teacher={address}"
    with strategy.scope():
        classifier = rebuild_classifier(model, len(images.dataset.class_names), images.config.seed, arrays, setting)
    return classifier_as_teacher(classifier)


def _answers(
    worker: Worker, images: ImageStore, sharding: Sharding, facts: dict[str, Any], build: Callable[[], Teacher]
) -> np.ndarray | None:
    """The teacher's answers for all training examples, from the cache where an earlier start left them; None where the
    run was asked to stop meanwhile. It sees the images at its own size, and at its own `resize` where that is known.
    """
    control, dataset, config = worker.control, images.dataset, images.config
    split, classes = dataset.splits["train"], len(dataset.class_names)
    resize = facts["model"]["resize"] if facts["model"] else config.model.resize
    key = (_FORMAT, facts["fingerprint"], dataset.fingerprint, split.count, resize, config.runtime.precision)
    digest = hashlib.sha256("\n".join(map(str, key)).encode()).hexdigest()[:16]
    file = config.runtime.cache_folder / "teachers" / f"{digest}.npz"
    cached = _read_answers(file, (split.count, classes)) if worker.is_chief else None
    if control.broadcast("teacher's answers cached", lambda: cached is not None):
        log.info(f"  its answers: taken from {file}, made by an earlier start")
        return control.broadcast_arrays("teacher's answers", {} if cached is None else {"answers": cached})["answers"]
    teacher = build()
    health.set_activity("the teacher's answers")
    log.info(f"  it answers for {split.count:,} training images at {teacher.image_size} px, once; kept in {file}")
    same = (teacher.image_size, resize) == (images.size, config.model.resize)
    pixels = images.split("train") if same else images.at("train", teacher.image_size, resize)
    batch_size = ROWS * worker.replicas * worker.size
    scored = Scorer(worker, teacher, sharding).score(pixels, batch_size, "teacher's answers")
    if worker.should_stop("while the teacher answered"):
        return None
    answers = np.full((split.count, classes), 1 / classes, np.float32)  # of what cannot be decoded: it counts nowhere
    answers[scored.indices] = scored.probabilities
    answers = control.broadcast_arrays("teacher's answers", {"answers": answers})["answers"]
    if worker.is_chief:
        try:
            write_whole(file, pack({"answers": answers}))
        except OSError as error:
            log.info(f"  they cannot be kept in {file.parent} ({error.strerror}); another start will ask again")
    return answers


def _read_answers(file: Path, shape: tuple[int, int]) -> np.ndarray | None:
    try:
        answers = unpack(file.read_bytes())["answers"]
    except (OSError, ValueError, KeyError):
        return None
    return answers if answers.shape == shape and answers.dtype == np.float32 else None
