"""The teacher of a run with knowledge distillation (Hinton et al. 2015), and its soft labels."""

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
from trainer.data.decoding import without_autograph
from trainer.data.images import ImageStore
from trainer.data.sharding import Sharding
from trainer.distillation import source
from trainer.distillation.source import KEY, ROWS, SAVED_MODEL, check_classes, check_same
from trainer.errors import DataError
from trainer.evaluation.scoring import Scorer
from trainer.monitoring.health import health
from trainer.monitoring.log import log
from trainer.runs.finished_run import rebuild_classifier
from trainer.storage.local import write_whole
from trainer.training.losses import log_probs

_FORMAT = 1  # version of cached soft labels; incremented when they change


@dataclass(frozen=True)
class Teacher:
    """A network for inference on images of side S pixels."""

    image_size: int
    forward: Callable[[Any], Any]  # float32 [b, S, S, 3] in 0..255 -> float32 [b, classes]

    def logits(self, images: Any, *, training: bool = False) -> tf.Tensor:  # noqa: ARG002 - it never trains
        """Compute float32 logits [b, classes], up to a constant per row, without gradient.

        Images are uint8 or float32 [b, s, s, 3] in 0..255; those of another side are resized to S (bilinear).
        """
        pixels = tf.cast(images, tf.float32)
        if pixels.shape[1] != self.image_size:
            pixels = tf.image.resize(pixels, [self.image_size, self.image_size])
        return tf.stop_gradient(self.forward(pixels))


def saved_model_as_teacher(folder: Path, address: str) -> Teacher:
    """Make a teacher from an exported SavedModel (`trainer/exporting/saved_model.py`), in the strategy's scope.

    Raises:
        DataError: it has no signature `images` with an output `probabilities` for images of one size.
    """
    loaded = tf.saved_model.load(str(folder))
    signature = loaded.signatures.get("images")
    spec = signature.structured_input_signature[1].get("images") if signature else None
    if spec is None or "probabilities" not in signature.structured_outputs or not spec.shape[1]:
        problem, fix = "has no signature `images` with an output `probabilities`", "give export/saved_model/1 of a run"
        raise DataError(problem, key=KEY, value=address, fix=f"{fix}, or its output_dir")

    def forward(images: Any) -> Any:
        assert loaded is not None  # its variables are deleted with it
        return log_probs(signature(images=images)["probabilities"])

    return Teacher(int(spec.shape[1]), forward)


@dataclass(frozen=True)
class OpenedTeacher:
    """Teacher of a run: a `network` for every step, or soft labels of all examples; neither if the run should stop."""

    fingerprint: str  # of its weights
    network: Teacher | None = None
    soft_labels: np.ndarray | None = None  # its probabilities, float32 [count, classes], by example index

    def with_soft_labels(self, batches: tf.data.Dataset) -> tf.data.Dataset:
        """Add the soft labels of the examples, if they are known, to training batches as `teacher`."""
        if self.soft_labels is None:
            return batches
        soft_labels = tf.constant(self.soft_labels)
        add_labels = without_autograph(lambda row: {**row, "teacher": tf.gather(soft_labels, row["index"])})
        return batches.map(add_labels)


def open_teacher(worker: Worker, images: ImageStore, sharding: Sharding, run: str, before: str | None) -> OpenedTeacher:
    """Open the configured teacher on all workers; only the chief reads it.

    Without augmentation every epoch has the same images, so the soft labels are computed now; with augmentation the
    teacher predicts in every step. Check `Worker.should_stop` afterwards.

    Args:
        run: the output_dir of the student, for messages.
        before: fingerprint of the teacher that this run began with; None for a new run.

    Raises:
        DataError: there is no teacher, it has other classes, or it is not the one that this run began with.
    """
    config = images.config
    assert config.distillation
    address, alpha, temperature = (getattr(config.distillation, key) for key in ("teacher", "alpha", "temperature"))
    files = source.find_teacher(address) if worker.is_chief else None
    facts: dict[str, Any] = worker.control.broadcast("teacher", lambda: files.facts if files else None)
    check_classes(address, tuple(facts["classes"]), images.dataset.class_names)
    check_same(run, before, facts["fingerprint"])
    loss = f"{alpha:g} x label + {1 - alpha:g} x KL(teacher, student)"
    at_temperature = f" at temperature {temperature:g}" if temperature != 1 else ""
    log.info(f"teacher: {facts['summary']}; loss = {loss}{at_temperature}")

    def build() -> Teacher:
        arrays = worker.control.broadcast_arrays("teacher's weights", source.read_teacher(files) if files else {})
        return _build(worker.strategy, images, address, facts, arrays)

    if config.augmentation.active:
        network = build()
        log.info("  it predicts in every step, for the augmented images")
        return OpenedTeacher(facts["fingerprint"], network=network)
    return OpenedTeacher(facts["fingerprint"], soft_labels=_soft_labels(worker, images, sharding, facts, build))


def _build(
    strategy: tf.distribute.Strategy, images: ImageStore, address: str, facts: dict[str, Any], arrays: dict[str, Any]
) -> Teacher:
    if facts["kind"] == SAVED_MODEL:
        with strategy.scope(), tempfile.TemporaryDirectory(prefix="kubetune-teacher-") as folder:
            source.write_saved_model(arrays, Path(folder))
            return saved_model_as_teacher(Path(folder), address)
    model, setting = Model(**facts["model"]), f"{KEY}={address}"
    with strategy.scope():
        classifier = rebuild_classifier(model, len(images.dataset.class_names), images.config.seed, arrays, setting)
    return Teacher(classifier.image_size, classifier.logits)


def _soft_labels(
    worker: Worker, images: ImageStore, sharding: Sharding, facts: dict[str, Any], build: Callable[[], Teacher]
) -> np.ndarray | None:
    """Return soft labels for images at the teacher's size and `resize`, if known; None if the run should stop."""
    control, dataset, config = worker.control, images.dataset, images.config
    split, classes = dataset.splits["train"], len(dataset.class_names)
    resize = facts["model"]["resize"] if facts["model"] else config.model.resize
    key = (_FORMAT, facts["fingerprint"], dataset.fingerprint, split.count, resize, config.runtime.precision)
    digest = hashlib.sha256("\n".join(map(str, key)).encode()).hexdigest()[:16]
    file = config.runtime.cache_folder / "teachers" / f"{digest}.npz"
    cached = _read_cached(file, (split.count, classes)) if worker.is_chief else None
    if control.broadcast("soft labels cached", lambda: cached is not None):
        log.info(f"  soft labels: read from {file}, computed by an earlier start")
        return control.broadcast_arrays("soft labels", {} if cached is None else {"answers": cached})["answers"]
    teacher = build()
    health.set_activity("the soft labels of the teacher")
    what = f"{split.count:,} training images at {teacher.image_size} px"
    log.info(f"  soft labels of {what}: computed once, stored in {file}")
    same = (teacher.image_size, resize) == (images.size, config.model.resize)
    pixels = images.split("train") if same else images.at("train", teacher.image_size, resize)
    batch_size = ROWS * worker.replicas * worker.size
    scored = Scorer(worker, teacher, sharding).score(pixels, batch_size, "soft labels")
    if worker.should_stop("while soft labels were computed"):
        return None
    labels = np.full((split.count, classes), 1 / classes, np.float32)  # also of undecodable images, of weight 0
    labels[scored.indices] = scored.probabilities
    labels = control.broadcast_arrays("soft labels", {"answers": labels})["answers"]
    if worker.is_chief:
        try:
            write_whole(file, pack({"answers": labels}))
        except OSError as error:
            log.info(
                f"  soft labels cannot be stored in {file.parent} ({error.strerror}); a restart computes them again"
            )
    return labels


def _read_cached(file: Path, shape: tuple[int, int]) -> np.ndarray | None:
    try:
        labels = unpack(file.read_bytes())["answers"]
    except (OSError, ValueError, KeyError):
        return None
    return labels if labels.shape == shape and labels.dtype == np.float32 else None
