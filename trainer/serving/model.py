"""Load the SavedModel of an export and predict encoded images with it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.errors import DataError
from trainer.private_api import make_saved_model_proto
from trainer.serving.export_files import GRAPH, Export, Prediction
from trainer.serving.settings import batch_sizes
from trainer.storage.disk import translate_disk_error

# Operations that `saved_model_cli scan` warns of, and those that print or call Python.
FORBIDDEN_OPS = {"ReadFile", "WriteFile", "PrintV2", "PyFunc", "PyFuncStateless", "EagerPyFunc"}
IMAGE_BYTES, EXPLAIN = "image_bytes", "explain"  # signatures
OUTPUTS = ("probabilities", "embedding", "heatmap")


class ServedModel:
    """A loaded export. Not thread-safe.

    Raises DataError if it cannot be loaded, does not fit its labels or reference, or contains forbidden operations.
    """

    def __init__(self, export: Export) -> None:
        address = export.address
        _check_operations(export)
        try:
            self._loaded = tf.saved_model.load(str(export.folder))  # signatures fail without a reference to it
        except Exception as error:  # a corrupt file raises errors of many classes
            if full := translate_disk_error(error, [export.folder, "/tmp"]):
                raise full from error
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"cannot be loaded ({text})", key="model", value=address, fix="export it again") from None
        signatures = self._loaded.signatures
        if IMAGE_BYTES not in signatures:
            problem = f"has no signature {IMAGE_BYTES}"
            raise DataError(problem, key="model", value=address, fix="export it with kubetune")
        width = signatures[IMAGE_BYTES].structured_outputs["probabilities"].shape[-1]
        if width != len(export.classes):
            problem = f"has {width} outputs for {len(export.classes)} classes"
            raise DataError(problem, key="model", value=address, fix="export it again")
        side = signatures["images"].structured_input_signature[1]["images"].shape[1] if "images" in signatures else 1
        self._blank = tf.io.encode_jpeg(np.zeros([side, side, 3], np.uint8)).numpy()
        self._explain = signatures.get(EXPLAIN)
        self.explains = self._explain is not None  # the export has the signature `explain`
        self._classify = _drop_heatmap(self._explain) if self._explain else signatures[IMAGE_BYTES]
        reference = (export.reference or {}).get("embedding")
        if reference and self._explain:
            width = self._explain.structured_outputs["embedding"].shape[-1]
            if width != len(reference.get("projection") or reference["mean"]):
                raise DataError("reference.json is of another model", key="model", value=address, fix="export it again")
        # Pad batches on a GPU, where each new batch size starts a search for the fastest kernels.
        self._pad = bool(tf.config.list_physical_devices("GPU"))

    def predict(self, images: Sequence[bytes], explain: bool = False) -> list[Prediction | str]:
        """Return for each encoded image its prediction, or the reason why it cannot be decoded.

        A batch that fails is halved, down to single images, so that a corrupt image does not affect the others.
        `explain` requires `explains` and adds heatmaps.
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
        """Call each signature with every batch size of `batch_sizes`, and return the sizes."""
        for size in (sizes := batch_sizes(max_batch)):
            for signature in filter(None, (self._classify, self._explain)):
                self._call(signature, [self._blank] * size)
        return sizes

    def _call(self, signature: Callable[..., Any], images: Sequence[bytes]) -> list[Prediction | str]:
        padded = list(images)
        if self._pad:
            padded += [self._blank] * (batch_sizes(len(padded))[-1] - len(padded))
        outputs = {name: value.numpy() for name, value in signature(image_bytes=tf.constant(padded, tf.string)).items()}
        return [Prediction(**{n: outputs[n][i] for n in OUTPUTS if n in outputs}) for i in range(len(images))]


def _drop_heatmap(signature: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls the signature `explain` without computing its heatmap."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "image_bytes")], autograph=False)
    def classify(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs = signature(image_bytes=image_bytes)
        return {name: outputs[name] for name in ("probabilities", "embedding")}

    return classify


def _check_operations(export: Export) -> None:
    """Raise a DataError if the graph can read or write files, print or call Python, as no export of kubetune does."""
    model = make_saved_model_proto()
    try:
        model.ParseFromString((export.folder / GRAPH).read_bytes())
    except Exception:  # DecodeError; its module is not public
        raise DataError(f"its {GRAPH} is corrupt", key="model", value=export.address, fix="export it again") from None
    forbidden = set()
    for graph in model.meta_graphs:
        nodes = [*graph.graph_def.node, *(n for f in graph.graph_def.library.function for n in f.node_def)]
        forbidden |= {node.op for node in nodes} & FORBIDDEN_OPS
    if forbidden:
        problem = f"is not loaded: its graph has {', '.join(sorted(forbidden))}, which no classifier needs"
        raise DataError(problem, key="model", value=export.address, fix="serve an export of kubetune")


# Prefixes of the lines that TensorFlow adds to the message of an operation that fails inside a function.
_GRAPH_LINES = ("Graph execution error", "Detected at node", "<stack traces", "File ", "[[", "(1) ", "Error reported")


def describe_decoding_error(error: tf.errors.OpError) -> str:
    """Return the first line of the message that is about the image, without node names."""
    lines = (line.strip() for line in (error.message or "").splitlines())
    text = next((line for line in lines if line and not line.startswith(_GRAPH_LINES)), "")
    return text.split("{{")[0].split("\t [[")[0].strip().rstrip(".")[:200] or "its pixels are invalid"
