"""Load an export's SavedModel, and predict encoded images with it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.errors import DataError
from trainer.private_api import make_saved_model_proto
from trainer.serving.export_files import GRAPH, Export, Prediction
from trainer.serving.settings import list_batch_sizes
from trainer.storage.disk import translate_disk_error

# Operations that read or write files, print, or call Python; `saved_model_cli scan` warns about the first three.
FORBIDDEN_OPS = {"ReadFile", "WriteFile", "PrintV2", "PyFunc", "PyFuncStateless", "EagerPyFunc"}
IMAGE_BYTES, EXPLAIN = "image_bytes", "explain"  # names of signatures
# Outputs of the signature `explain`; other signatures return only the first one.
EXPLAIN_OUTPUTS = ("probabilities", "embedding", "heatmap")


class ServedModel:
    """A loaded export. Not thread-safe.

    Raises:
        DataError: the export cannot be loaded, does not fit its labels or reference, or has one of `FORBIDDEN_OPS`.
        Interrupted: the disk is full or fails.
    """

    def __init__(self, export: Export) -> None:
        address = export.address
        _check_operations(export)
        try:
            self._loaded = tf.saved_model.load(str(export.folder))  # signatures fail once this object is deleted
        except Exception as error:  # a corrupt file raises errors of many classes
            if disk_error := translate_disk_error(error, [export.folder, "/tmp"]):
                raise disk_error from error
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"cannot be loaded ({reason})", key="model", value=address, fix="export it again") from None
        signatures = self._loaded.signatures
        if IMAGE_BYTES not in signatures:
            problem = f"has no signature {IMAGE_BYTES}"
            raise DataError(problem, key="model", value=address, fix="export it with kubetune")
        width = signatures[IMAGE_BYTES].structured_outputs["probabilities"].shape[-1]
        if width != len(export.classes):
            problem = f"has {width} outputs for {len(export.classes)} classes"
            raise DataError(problem, key="model", value=address, fix="export it again")
        size = signatures["images"].structured_input_signature[1]["images"].shape[1] if "images" in signatures else 1
        self._blank = tf.io.encode_jpeg(np.zeros([size, size, 3], np.uint8)).numpy()  # for warm-up and padding
        self._explain = signatures.get(EXPLAIN)
        self.explains = self._explain is not None  # whether the export has the signature `explain`
        # Returns probabilities, and embeddings if the export has the signature `explain`.
        self._classify = _drop_heatmap(self._explain) if self._explain else signatures[IMAGE_BYTES]
        reference = (export.reference or {}).get("embedding")
        if reference and self._explain:
            width = self._explain.structured_outputs["embedding"].shape[-1]
            if width != len(reference.get("projection") or reference["mean"]):
                raise DataError("reference.json is of another model", key="model", value=address, fix="export it again")
        # On a GPU, each new batch size starts a search for the fastest kernels, so batches are padded to fixed sizes.
        self._pad = bool(tf.config.list_physical_devices("GPU"))

    def predict(self, images: Sequence[bytes], explain: bool = False) -> list[Prediction | str]:
        """Return each image's prediction, or the reason why the image cannot be decoded.

        A batch that fails is halved, down to single images, so that a corrupt image does not affect the others.

        Args:
            images: contents of image files.
            explain: whether to compute heatmaps, which requires that `explains` is true.
        """
        signature = self._explain if explain else self._classify
        assert signature, "requires `explains`"
        try:
            return self._call(signature, images)
        except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError, tf.errors.OutOfRangeError) as error:
            if len(images) == 1:
                return [describe_decoding_error(error)]
        half = len(images) // 2
        return self.predict(images[:half], explain) + self.predict(images[half:], explain)

    def warm_up(self, max_batch: int) -> list[int]:
        """Call each signature once per batch size, so that later calls are fast. Return the batch sizes."""
        for size in (sizes := list_batch_sizes(max_batch)):
            for signature in filter(None, (self._classify, self._explain)):
                self._call(signature, [self._blank] * size)
        return sizes

    def _call(self, signature: Callable[..., Any], images: Sequence[bytes]) -> list[Prediction | str]:
        """Call a signature with encoded images; return one prediction per image."""
        padded = list(images)
        if self._pad:
            padded += [self._blank] * (list_batch_sizes(len(padded))[-1] - len(padded))
        outputs = {name: value.numpy() for name, value in signature(image_bytes=tf.constant(padded, tf.string)).items()}
        return [Prediction(**{n: outputs[n][i] for n in EXPLAIN_OUTPUTS if n in outputs}) for i in range(len(images))]


def _drop_heatmap(signature: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with the outputs of `signature` except the heatmap, which TensorFlow then does not compute."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "image_bytes")], autograph=False)
    def classify(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs = signature(image_bytes=image_bytes)
        return {name: outputs[name] for name in ("probabilities", "embedding")}

    return classify


def _check_operations(export: Export) -> None:
    """Raise a DataError if the graph is corrupt or contains one of `FORBIDDEN_OPS`, which kubetune never exports."""
    model = make_saved_model_proto()
    try:
        model.ParseFromString((export.folder / GRAPH).read_bytes())
    except Exception:  # DecodeError, whose module is not public
        raise DataError(f"its {GRAPH} is corrupt", key="model", value=export.address, fix="export it again") from None
    forbidden = set()
    for graph in model.meta_graphs:
        nodes = [*graph.graph_def.node, *(n for f in graph.graph_def.library.function for n in f.node_def)]
        forbidden |= {node.op for node in nodes} & FORBIDDEN_OPS
    if forbidden:
        problem = f"is not loaded: its graph has {', '.join(sorted(forbidden))}, which no classifier needs"
        raise DataError(problem, key="model", value=export.address, fix="serve an export of kubetune")


# Prefixes of the lines that TensorFlow adds to an operation's error message if the operation is in a tf.function
_GRAPH_LINE_PREFIXES = (
    "Graph execution error", "Detected at node", "<stack traces", "File ", "[[", "(1) ", "Error reported",
)  # fmt: skip


def describe_decoding_error(error: tf.errors.OpError) -> str:
    """Return the first line of an error message that is about the image, without the names of graph nodes."""
    lines = (line.strip() for line in (error.message or "").splitlines())
    reason = next((line for line in lines if line and not line.startswith(_GRAPH_LINE_PREFIXES)), "")
    return reason.split("{{")[0].split("\t [[")[0].strip().rstrip(".")[:200] or "its pixels are invalid"
