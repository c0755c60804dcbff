"""Open the classifier of a run or an export, and predict encoded images with it."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import tensorflow as tf

from trainer.data.decoding import Resize, decode_image
from trainer.errors import DataError
from trainer.evaluation.distance import EmbeddingDistance, build_embedding_distance
from trainer.evaluation.drift import parse_reference, read_reference
from trainer.evaluation.scoring import get_images_per_call
from trainer.exporting.verify import load_export
from trainer.models.classifier import Classifier
from trainer.names import escape_unprintable
from trainer.runs.stored_run import StoredRun, find_checkpoint, load_checkpoint, open_classifier
from trainer.serving.export_files import MAX_EXPORT_BYTES, Prediction, find_export
from trainer.serving.model import ServedModel, describe_decoding_error
from trainer.storage.local import compute_file_crc32c
from trainer.storage.path import StoragePath, storage_path
from trainer.storage.staging import is_remote, stage
from trainer.storage.versions import checksum_files, list_versions
from trainer.types import LogMessage, Orientation

# Files of an `export` folder that has no SavedModel. The first one that exists is used.
EXPORT_FILES = ("model.keras", "model.onnx", "model.tflite", "model_float16.tflite", "model_dynamic.tflite",
                "model_int8.tflite")  # fmt: skip
SUFFIXES = (".keras", ".onnx", ".tflite")

PixelArray = np.ndarray  # uint8 [S, S, 3]
# Images, uint8 [n, S, S, 3] -> (probabilities, float32 [n, classes]; embeddings, float32 [n, C], or None).
Predict = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]


@dataclass(frozen=True)
class Preprocessing:
    """How encoded images are converted to the input of a model, as in its training."""

    image_size: int  # S, in pixels
    resize: Resize
    orientation: Orientation


@dataclass(frozen=True)
class Model:
    """A classifier of encoded images. Several threads may call `prepare`; only one may call `predict` at a time.

    `prepare` converts the encoded bytes of an image to one input of `predict`. It returns a str, the reason, if the
    image cannot be decoded.

    `predict` takes n inputs and `flip`, and returns three values: probabilities, float32 [n, classes]; embeddings,
    float32 [n, C], or None if the model has none; and row -> reason for inputs that it cannot decode. The outputs in
    these rows are 0.
    """

    name: str  # backbone and checkpoint, or the file, for messages
    class_names: tuple[str, ...]
    identity: str  # changes if the weights or the preprocessing change
    prepare: Callable[[bytes], PixelArray | bytes | str]
    predict: Callable[[Sequence[Any], bool], tuple[np.ndarray, np.ndarray | None, dict[int, str]]]
    decode: Callable[[bytes], PixelArray | str] | None  # encoded image -> pixels or reason; None: unknown preprocessing
    distance: EmbeddingDistance | None
    no_distance_reason: str  # reason why there is no distance; "" if there is one
    image_size: int | None = None  # S, in pixels; None for a SavedModel, which decodes images itself
    notes: tuple[str, ...] = ()  # warnings to log


def make_decoder(preprocessing: Preprocessing) -> Callable[[bytes], PixelArray | str]:
    """Return a function that decodes an image exactly as in training and evaluation. Several threads may call it.

    The function takes encoded bytes, and returns uint8 [S, S, 3], or the reason (a str) why they cannot be decoded.
    """
    size, resize, orientation = preprocessing.image_size, preprocessing.resize, preprocessing.orientation

    def decode_on_cpu(data: tf.Tensor) -> tf.Tensor:
        with tf.device("CPU"):  # as in the input pipeline
            return decode_image(data, size, resize, orientation)

    signature = [tf.TensorSpec([], tf.string)]
    # Calls of a tf.function would trace it again in each thread; a concrete function is traced once.
    compiled = tf.function(decode_on_cpu, input_signature=signature, autograph=False).get_concrete_function()

    def decode(data: bytes) -> PixelArray | str:
        try:
            return np.asarray(compiled(tf.constant(data)).numpy())
        except (tf.errors.CancelledError, tf.errors.AbortedError):
            raise
        except tf.errors.OpError as error:
            return describe_decoding_error(error)

    return decode


def predict_padded(predict: Predict, images: np.ndarray, flip: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Predict images in zero-padded batches of constant size, so that the bits of a prediction do not depend on n.

    Args:
        images: uint8 [n, S, S, 3], n >= 1.
        flip: average the probabilities of each image and its mirror image. The embeddings are not averaged.

    Returns:
        Probabilities, float32 [n, classes]; embeddings, float32 [n, C], or None if `predict` returns none.
    """
    rows = get_images_per_call()
    outputs = []
    for start in range(0, len(images), rows):
        batch = images[start : start + rows]
        count = len(batch)
        batch = np.concatenate([batch, np.zeros((rows - count, *batch.shape[1:]), np.uint8)])
        probabilities, embeddings = predict(batch)
        if flip:
            probabilities = (probabilities + predict(batch[:, :, ::-1])[0]) / np.float32(2)
        outputs.append((probabilities[:count], None if embeddings is None else embeddings[:count]))
    all_embeddings = None if outputs[0][1] is None else np.concatenate([e for _, e in outputs if e is not None])
    return np.concatenate([p for p, _ in outputs]), all_embeddings


def compile_classifier(classifier: Classifier) -> Predict:
    """Compile the function from images to probabilities and embeddings. An evaluation has bit-identical results."""
    size = classifier.image_size

    def compute(images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        features = classifier.features(images)
        return tf.nn.softmax(classifier.head_logits(features)), classifier.pool(features)

    signature = tf.TensorSpec([None, size, size, 3], tf.uint8)
    compiled = tf.function(compute, input_signature=[signature], autograph=False)

    def predict(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        probabilities, embeddings = compiled(tf.constant(images))
        return probabilities.numpy(), embeddings.numpy()

    return predict


def open_run_model(run: StoredRun, which: str | None) -> tuple[Model, Predict]:
    """Open a checkpoint of a run.

    Args:
        which: "best", "last", a step, or a phase; None for the checkpoint that the run exports.

    Returns:
        The model, and the compiled function from decoded images that the model calls.

    Raises:
        ConfigError: `which` is invalid.
        DataError: the run does not have the checkpoint, or it is corrupt.
        Interrupted: a bucket does not respond.
        ModelError: the backbone cannot be built.
    """
    checkpoint = load_checkpoint(run, which)
    classifier = open_classifier(run, checkpoint)
    keep = run.config.training.keep
    is_exported = which in (None, keep) or find_checkpoint(run, keep).name == find_checkpoint(run, str(which)).name
    predict = compile_classifier(classifier)
    distance, no_distance_reason = None, f"the reference distribution is that of checkpoint={keep}"
    if is_exported:
        try:
            width = int(classifier.backbone.output_shape[-1])
            distance, no_distance_reason = _open_distance(read_reference(run.address), width)
        except DataError as error:
            no_distance_reason = f"the run {error.problem}"
    crc = 0
    for name in sorted(checkpoint.values):
        crc = google_crc32c.extend(crc, np.ascontiguousarray(checkpoint.values[name]).tobytes())
    preprocessing = Preprocessing(classifier.image_size, run.config.model.resize, run.config.data.orientation)
    name = f"{run.config.model.backbone}, {checkpoint.name} (step {checkpoint.step}) of {run.address}"
    settings = f"{run.config.model.model_dump_json()} {run.config.runtime.precision}"
    identity = f"step {checkpoint.step} {crc} {preprocessing} {settings}"
    return _make_pixel_model(
        name, run.class_names, identity, preprocessing, predict, distance, no_distance_reason
    ), predict


def _open_distance(reference: Mapping[str, Any], width: int) -> tuple[EmbeddingDistance | None, str]:
    """Return the distance of embeddings, float32 [n, width], from `reference`, and ""; or None and the reason."""
    distance = build_embedding_distance(reference)
    if distance is None:
        return None, "reference.json has no embedding"
    if distance.width != width:
        return None, "reference.json is of another model"
    return distance, ""


def _make_pixel_model(
    name: str,
    class_names: tuple[str, ...],
    identity: str,
    preprocessing: Preprocessing,
    predict: Predict,
    distance: EmbeddingDistance | None,
    no_distance_reason: str,
) -> Model:
    """Return a model that decodes images and calls `predict` with the pixels."""
    decode = make_decoder(preprocessing)

    def predict_pixels(images: Sequence[Any], flip: bool) -> tuple[np.ndarray, np.ndarray | None, dict[int, str]]:
        return *predict_padded(predict, np.stack(images), flip), {}

    size = preprocessing.image_size
    return Model(name, class_names, identity, decode, predict_pixels, decode, distance, no_distance_reason, size)


def open_export_model(address: str, key: str, cache_dir: Path, flip: bool, log_message: LogMessage) -> Model:
    """Open the model of an export: a SavedModel if there is one, otherwise a Keras, ONNX or LiteRT file.

    Args:
        address: a Keras, ONNX or LiteRT file, a SavedModel, a folder of numbered SavedModels, an `export` folder, or
            a run's output_dir; local or gs://.
        key: the argument that has the address ("run" or "export"), for messages.
        cache_dir: folder for the local copy of an export in a bucket.
        flip: prepare for predicting mirror images, which requires that a SavedModel's preprocessing is known.
        log_message: called with messages about copied files and corrupt versions.

    Raises:
        DataError: there is no export, it is corrupt or has no class names, or `flip` is True and the preprocessing of
            the SavedModel is unknown.
        Interrupted: a bucket does not respond.
        ModelError: the file cannot be loaded.
    """
    root = storage_path(address)
    try:
        if root.name.lower().endswith(SUFFIXES) and root.exists():
            return _open_file(root, address, key, cache_dir, log_message)
        if not _has_saved_model(root):
            for folder in (root, root / "export"):
                if file := next((folder / name for name in EXPORT_FILES if (folder / name).exists()), None):
                    return _open_file(file, address, key, cache_dir, log_message)
        return _open_saved_model(address, cache_dir, flip, log_message)
    except DataError as error:
        error.key = key if error.key == "model" else error.key
        raise


def _has_saved_model(root: StoragePath) -> bool:
    """Return whether a folder is, or has at the usual paths, a SavedModel or numbered versions of one."""
    folders = (root, root / "saved_model", root / "export" / "saved_model")  # each may have numbered versions
    return (root / "saved_model.pb").exists() or any(map(list_versions, folders))


def _open_saved_model(address: str, cache_dir: Path, flip: bool, log_message: LogMessage) -> Model:
    """Open the newest SavedModel at an address, which decodes and predicts encoded images itself."""
    export = find_export(address, cache_dir, log_message)
    served = ServedModel(export)
    reference = export.reference or {}
    width = len(export.classes)
    preprocessing = _read_preprocessing(reference)
    classify = None
    if flip:
        if preprocessing is None:
            problem = "is an export without reference.json, which has the preprocessing of the pixels"
            raise DataError(problem, key="model", value=address, fix="use tta=none, or give the run")
        classify = load_export(export.folder)
    decode = make_decoder(preprocessing) if preprocessing else None

    def predict(images: Sequence[Any], flip: bool) -> tuple[np.ndarray, np.ndarray | None, dict[int, str]]:
        predictions = served.predict(images)
        reasons = {i: p for i, p in enumerate(predictions) if isinstance(p, str)}
        empty_prediction = Prediction(np.zeros(width, np.float32))
        rows = [empty_prediction if isinstance(p, str) else p for p in predictions]
        probabilities = np.stack([p.probabilities for p in rows])
        if flip and classify and decode:
            pixels = {i: decode(data) for i, data in enumerate(images) if i not in reasons}
            rows_to_flip = [i for i, p in pixels.items() if not isinstance(p, str)]
            if rows_to_flip:
                mirrored = np.stack([np.asarray(pixels[i])[:, ::-1] for i in rows_to_flip])
                probabilities[rows_to_flip] = (probabilities[rows_to_flip] + classify(mirrored)) / np.float32(2)
        sizes = [len(p.embedding) for p in rows if p.embedding is not None]
        embeddings = np.zeros((len(rows), sizes[0]), np.float32) if sizes else None
        for i, p in enumerate(rows):
            if embeddings is not None and p.embedding is not None:
                embeddings[i] = p.embedding
        return probabilities, embeddings, reasons

    distance = build_embedding_distance(reference)
    no_distance_reason = "" if reference else "the export has no reference.json"
    if distance is None or not served.explains:
        distance, no_distance_reason = None, no_distance_reason or "the export has no embedding"
    name = f"SavedModel {export.folder if not is_remote(address) else address}"
    identity = hashlib.sha256(repr(checksum_files(export.folder)).encode()).hexdigest()
    return Model(name, export.classes, identity, lambda data: data, predict, decode, distance, no_distance_reason)


def _read_preprocessing(reference: Mapping[str, Any]) -> Preprocessing | None:
    """Return the preprocessing in the content of reference.json, or None if it is missing or unknown."""
    size, resize = reference.get("image_size"), reference.get("resize")
    orientation = reference.get("orientation", "ignore")  # exports by older versions did not turn images
    if not isinstance(size, int) or size < 1 or resize not in ("stretch", "crop"):
        return None
    if orientation not in ("exif", "ignore"):
        return None
    return Preprocessing(size, resize, orientation)


def _open_file(file: StoragePath, address: str, key: str, cache_dir: Path, log_message: LogMessage) -> Model:
    """Open a Keras, ONNX or LiteRT file. Class names and preprocessing are in labels.txt and reference.json next to it.

    A LiteRT file may contain the class names. Without a reference.json, the default preprocessing of training is used.
    """
    local_path = Path(stage(str(file), cache_dir, MAX_EXPORT_BYTES, log_message, check_cancelled=lambda: None))
    labels, reference_content = ((file.parent / name).fetch() for name in ("labels.txt", "reference.json"))
    label_bytes = labels[0] if labels else _read_embedded_labels(local_path)
    try:
        class_names = tuple((label_bytes or b"").decode("utf-8-sig").splitlines())
    except UnicodeDecodeError:
        class_names = ()
    if not class_names:
        problem = f"has no labels.txt next to {escape_unprintable(file.name)}"
        raise DataError(problem, key=key, value=address, fix="give the folder of the export, or export it again")
    reference = parse_reference(reference_content[0], class_names) if reference_content else {}
    if reference is None:
        problem = "its reference.json is corrupt or of another model"
        raise DataError(problem, key=key, value=address, fix="export it again")
    classify = load_export(local_path)
    preprocessing = _read_preprocessing(reference)
    notes: tuple[str, ...] = ()
    if preprocessing is None:
        preprocessing = Preprocessing(_read_input_size(local_path), "stretch", "exif")
        notes = ("the export has no reference.json: images are turned upright and stretched, the default of training",)
    side = preprocessing.image_size
    num_outputs = classify(np.zeros((1, side, side, 3), np.uint8)).shape[-1]
    if num_outputs != len(class_names):
        problem = f"has {num_outputs} outputs for {len(class_names)} classes"
        raise DataError(problem, key=key, value=address, fix="export it again")
    no_distance_reason = "a Keras, ONNX or LiteRT file has no embedding; a SavedModel has"
    identity = f"{compute_file_crc32c(local_path)} {preprocessing} {class_names}"
    model = _make_pixel_model(
        str(file),
        class_names,
        identity,
        preprocessing,
        lambda images: (classify(images), None),
        distance=None,
        no_distance_reason=no_distance_reason,
    )
    return replace(model, notes=notes)


def _read_embedded_labels(file: Path) -> bytes | None:
    """Return labels.txt from a LiteRT file, which is a ZIP archive if it contains one. Return None if it does not."""
    with suppress(OSError, KeyError, zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
        return archive.read("labels.txt")
    return None


def _read_input_size(file: Path) -> int:
    """Return S, the image size of the input [n, S, S, 3] of a Keras, ONNX or LiteRT file, in pixels."""
    if file.suffix == ".keras":
        import keras

        return int(keras.saving.load_model(file, compile=False, safe_mode=True).input_shape[1])
    if file.suffix == ".onnx":
        import onnxruntime

        session: Any = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        return int(session.get_inputs()[0].shape[1])
    from ai_edge_litert.interpreter import Interpreter

    return int(Interpreter(model_content=file.read_bytes()).get_input_details()[0]["shape"][1])
