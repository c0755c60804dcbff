"""Load the teacher for knowledge distillation (Hinton et al. 2015), and compute its soft labels."""

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.cluster.worker import Worker
from trainer.config.schema import Model
from trainer.data.decoding import Resize, without_autograph
from trainer.data.images import ImageStore
from trainer.data.sharding import Sharding
from trainer.distillation import teacher_files
from trainer.distillation.own_teacher import locate_teacher
from trainer.distillation.teacher_files import KEY, ROWS_PER_CALL, check_classes, check_same_teacher
from trainer.errors import DataError
from trainer.evaluation.scoring import Scorer
from trainer.models.classifier import Classifier, count_variable_bytes
from trainer.monitoring.health import health
from trainer.monitoring.log import log
from trainer.runs.stored_run import rebuild_classifier
from trainer.storage.arrays import pack, unpack
from trainer.storage.local import write_atomically
from trainer.storage.small_files import CONTENT_ERRORS
from trainer.training.losses import safe_log

_FORMAT = 1  # version of the cached soft labels; increment it when a code change alters their values


@dataclass(frozen=True)
class Teacher:
    """The teacher's network for inference. S is `image_size`, the side of its input in pixels."""

    image_size: int
    forward: Callable[[Any], Any]  # images, float32 [b, S, S, 3] in 0..255 -> logits, float32 [b, classes]
    variable_bytes: int = 0  # total size of the variables
    classifier: Classifier | None = None  # None for a SavedModel

    def logits(self, images: Any, *, training: bool = False) -> tf.Tensor:  # noqa: ARG002 - required by `Network`
        """Compute logits, float32 [b, classes], without a gradient.

        For a SavedModel, these are log-probabilities, which differ from its logits by a constant per row.

        Args:
            images: uint8 or float32 [b, s, s, 3] in 0..255. They are resized bilinearly if s is not S.
            training: ignored.
        """
        pixels = tf.cast(images, tf.float32)
        if pixels.shape[1] != self.image_size:
            pixels = tf.image.resize(pixels, [self.image_size, self.image_size])
        return tf.stop_gradient(self.forward(pixels))


def load_saved_model_teacher(folder: Path, address: str) -> Teacher:
    """Load an exported SavedModel as a teacher. Must be called in the scope of the strategy.

    Args:
        folder: local folder of the SavedModel.
        address: the configured address, for error messages.

    Raises:
        DataError: the SavedModel has no signature `images` with a fixed image size and an output `probabilities`.
    """
    loaded = tf.saved_model.load(str(folder))
    signature = loaded.signatures.get("images")
    spec = signature.structured_input_signature[1].get("images") if signature else None
    if spec is None or "probabilities" not in signature.structured_outputs or not spec.shape[1]:
        problem, fix = "has no signature `images` with an output `probabilities`", "give export/saved_model/1 of a run"
        raise DataError(problem, key=KEY, value=address, fix=f"{fix}, or its output_dir")

    def forward(images: Any) -> Any:
        assert loaded is not None  # while this function refers to `loaded`, its variables are not deleted
        return safe_log(signature(images=images)["probabilities"])

    return Teacher(int(spec.shape[1]), forward, count_variable_bytes(signature.variables))


@dataclass(frozen=True)
class OpenedTeacher:
    """The teacher in training: a network that predicts in every step, or the soft labels of all training examples.

    Both are None if a stop request ended the computation of the soft labels.
    """

    fingerprint: str  # hash of the teacher's files
    network: Teacher | None = None
    soft_labels: np.ndarray | None = None  # probabilities, float32 [training examples, classes], by example index

    def add_soft_labels(self, batches: tf.data.Dataset) -> tf.data.Dataset:
        """Add the soft labels, if there are any, to training batches: key `teacher`, float32 [b, classes]."""
        if self.soft_labels is None:
            return batches
        soft_labels = tf.constant(self.soft_labels)
        add_labels = without_autograph(lambda row: {**row, "teacher": tf.gather(soft_labels, row["index"])})
        return batches.map(add_labels)


@dataclass
class ConfiguredTeacher:
    """The configured teacher: its network, or the soft labels that an earlier start (process) of the run computed."""

    fingerprint: str  # hash of the teacher's files
    resize: Resize  # how the images that it predicts become square
    labels_file: Path  # cache file of the soft labels
    network: Teacher | None  # None if there are soft labels; `open_teacher` releases it when it has computed them
    soft_labels: np.ndarray | None  # probabilities, float32 [training examples, classes]


def load_teacher(worker: Worker, images: ImageStore, run: str, recorded: str | None) -> ConfiguredTeacher:
    """Check and load the configured teacher. All workers must call this; the chief reads the files and broadcasts them.

    If augmentation is off and an earlier start cached the soft labels, they are loaded instead of the network.

    Args:
        run: output_dir of this run.
        recorded: fingerprint of the teacher with which this run began; None for a new run.

    Raises:
        DataError: there is no teacher at the address, it has other classes, its files are corrupt, or this run began
            with another teacher.
        ConfigError: the config.yaml of the teacher's run is not valid in this version.
        ModelError: the teacher's network cannot be built.
    """
    config = images.config
    dataset = images.dataset
    control = worker.control
    assert config.distillation
    address = locate_teacher(config.distillation.teacher, run)
    alpha, temperature = config.distillation.alpha, config.distillation.temperature
    files = teacher_files.describe_teacher(address) if worker.is_chief else None
    properties: dict[str, Any] = control.broadcast("teacher", lambda: files.properties if files else None)
    check_classes(address, tuple(properties["classes"]), dataset.class_names)
    check_same_teacher(run, recorded, properties["fingerprint"])
    loss = f"{alpha:g} x label + {1 - alpha:g} x KL(teacher, student)"
    at_temperature = f" at temperature {temperature:g}" if temperature != 1 else ""
    log.info(f"teacher: {properties['summary']}; loss = {loss}{at_temperature}")

    split = dataset.splits["train"]
    num_classes = len(dataset.class_names)
    resize = properties["model"]["resize"] if properties["model"] else config.model.resize
    key = (_FORMAT, properties["fingerprint"], dataset.fingerprint, split.count, resize, split.orientation,
           config.runtime.precision)  # fmt: skip
    digest = hashlib.sha256("\n".join(map(str, key)).encode()).hexdigest()[:16]
    labels_file = config.runtime.cache_folder / "teachers" / f"{digest}.npz"
    network, labels = None, None
    if worker.is_chief and not config.augmentation.active:
        labels = _read_cached(labels_file, (split.count, num_classes))
    if control.broadcast("soft labels cached", lambda: labels is not None):
        log.info(f"  soft labels: read from {labels_file}, computed by an earlier start")
        labels = control.broadcast_arrays("soft labels", {} if labels is None else {"answers": labels})["answers"]
    else:
        arrays = control.broadcast_arrays("teacher's weights", teacher_files.read_weights(files) if files else {})
        network = _build(worker, images, properties["model"], arrays, address)
    return ConfiguredTeacher(properties["fingerprint"], resize, labels_file, network, labels)


def _build(
    worker: Worker, images: ImageStore, model: dict[str, Any] | None, arrays: dict[str, np.ndarray], address: str
) -> Teacher:
    """Build the teacher's network on this worker.

    Args:
        model: configuration of a checkpoint's network, as JSON values; None for a SavedModel.
        arrays: variables of a checkpoint by name, or files of a SavedModel by path (`teacher_files.read_weights`).
    """
    with worker.strategy.scope():
        if model is None:
            with tempfile.TemporaryDirectory(prefix="kubetune-teacher-") as folder:
                teacher_files.write_saved_model(arrays, Path(folder))
                return load_saved_model_teacher(Path(folder), address)
        num_classes = len(images.dataset.class_names)
        seed = images.config.seed
        classifier = rebuild_classifier(Model(**model), num_classes, seed, arrays, f"{KEY}={address}")
    variable_bytes = count_variable_bytes(classifier.variables.values())
    return Teacher(classifier.image_size, classifier.logits, variable_bytes, classifier)


def open_teacher(
    worker: Worker, images: ImageStore, sharding: Sharding, configured: ConfiguredTeacher
) -> OpenedTeacher:
    """Prepare the teacher for training. All workers must call this.

    Without augmentation, every epoch has the same images, so their soft labels are computed now, unless they were
    cached. With augmentation, the teacher predicts in every step. A stop request ends the computation of soft labels
    early, so call `Worker.should_stop` before using the result.
    """
    network, labels = configured.network, configured.soft_labels
    if network is None:
        return OpenedTeacher(configured.fingerprint, soft_labels=labels)
    if images.config.augmentation.active:
        log.info("teacher: it predicts in every step, for the augmented images")
        return OpenedTeacher(configured.fingerprint, network=network)
    labels = _compute_soft_labels(worker, images, sharding, configured, network)
    configured.network = None
    return OpenedTeacher(configured.fingerprint, soft_labels=labels)


def _compute_soft_labels(
    worker: Worker, images: ImageStore, sharding: Sharding, configured: ConfiguredTeacher, teacher: Teacher
) -> np.ndarray | None:
    """Compute and cache the soft labels of the training images, float32 [training examples, classes].

    The images are resized to the teacher's input size with its resize mode. Return None after a stop request.
    """
    control = worker.control
    config = images.config
    labels_file = configured.labels_file
    resize = configured.resize
    split = images.dataset.splits["train"]
    num_classes = len(images.dataset.class_names)
    health.set_activity("the soft labels of the teacher")
    subject = f"{split.count:,} training images at {teacher.image_size} px"
    log.info(f"soft labels of {subject}: computed once, stored in {labels_file}")
    same_images = (teacher.image_size, resize) == (images.size, config.model.resize)  # as the student's
    pixels = images.open_split("train") if same_images else images.open_resized("train", teacher.image_size, resize)
    batch_size = ROWS_PER_CALL * worker.replicas * worker.size
    predictions = Scorer(worker, teacher, sharding, rows_per_call=ROWS_PER_CALL).score(
        pixels, batch_size, "soft labels"
    )
    if worker.should_stop("while soft labels were computed"):
        return None
    # Examples without a prediction have an undecodable image, so their weight in training is 0.
    labels = np.full((split.count, num_classes), 1 / num_classes, np.float32)
    labels[predictions.indices] = predictions.probabilities
    labels = control.broadcast_arrays("soft labels", {"answers": labels})["answers"]
    if worker.is_chief:
        try:
            write_atomically(labels_file, pack({"answers": labels}))
        except OSError as error:
            problem = f"soft labels cannot be stored in {labels_file.parent} ({error.strerror})"
            log.info(f"  {problem}; a restart computes them again")
    return labels


def _read_cached(file: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """Read cached soft labels of this shape, float32; None if the file is missing or corrupt."""
    try:
        labels = unpack(file.read_bytes())["answers"]
    except (OSError, *CONTENT_ERRORS):
        return None
    return labels if labels.shape == shape and labels.dtype == np.float32 else None
