"""The SavedModel behind the server."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.errors import DataError
from trainer.private_api import new_saved_model_proto
from trainer.serving.export_files import GRAPH, Export, Prediction
from trainer.serving.settings import batch_sizes

# The operations that `saved_model_cli scan` warns of, and calls into Python.
FORBIDDEN = {"ReadFile", "WriteFile", "PrintV2", "PyFunc", "PyFuncStateless", "EagerPyFunc"}
BYTES, EXPLAIN = "image_bytes", "explain"
OUTPUTS = ("probabilities", "embedding", "heatmap")


class ServedModel:
    """A loaded export. Not thread-safe.

    Attributes:
        explains: the export has the signature `explain`.

    Raises:
        DataError: it cannot be loaded, does not fit its labels, or contains forbidden operations.
    """

    def __init__(self, export: Export) -> None:
        self.export = export
        address = export.address
        _check_operations(export)
        try:
            self._loaded = tf.saved_model.load(str(export.folder))  # keeps the signatures alive
        except Exception as error:  # of any class, for a damaged file
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"cannot be loaded ({text})", key="model", value=address, fix="export again") from None
        signatures = self._loaded.signatures
        if BYTES not in signatures:
            raise DataError(f"has no signature {BYTES}", key="model", value=address, fix="export it with kubetune")
        width = signatures[BYTES].structured_outputs["probabilities"].shape[-1]
        if width != len(export.classes):
            raise DataError(
                f"has {width} outputs for {len(export.classes)} classes", key="model", value=address, fix="export again"
            )
        side = signatures["images"].structured_input_signature[1]["images"].shape[1] if "images" in signatures else 1
        self._blank = tf.io.encode_jpeg(np.zeros([side, side, 3], np.uint8)).numpy()
        self._explain = signatures.get(EXPLAIN)
        self.explains = self._explain is not None
        self._classify = _without_heatmap(self._explain) if self._explain else signatures[BYTES]
        own = (export.reference or {}).get("embedding")
        if own and self._explain:
            width = self._explain.structured_outputs["embedding"].shape[-1]
            if width != len(own.get("projection") or own["mean"]):
                raise DataError("reference.json is of another model", key="model", value=address, fix="export again")
        # On a GPU each new batch size starts a search for the fastest kernels.
        self._pad = bool(tf.config.list_physical_devices("GPU"))

    def predict(self, images: Sequence[bytes], explain: bool = False) -> list[Prediction | str]:
        """One prediction per encoded image, or the reason why it cannot be decoded; with `explain` also heatmaps."""
        signature = self._explain if explain else self._classify
        assert signature, "check `explains` first"
        try:
            return self._call(signature, images)
        except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError, tf.errors.OutOfRangeError) as error:
            if len(images) == 1:
                return [_reason(error)]
        half = len(images) // 2
        return self.predict(images[:half], explain) + self.predict(images[half:], explain)

    def warm_up(self, largest: int) -> list[int]:
        """Call the signatures once for each size that batches are padded to, and return the sizes."""
        for size in (sizes := batch_sizes(largest)):
            for signature in filter(None, (self._classify, self._explain)):
                self._call(signature, [self._blank] * size)
        return sizes

    def _call(self, signature: Callable[..., Any], images: Sequence[bytes]) -> list[Prediction | str]:
        rows = list(images)
        if self._pad:
            rows += [self._blank] * (batch_sizes(len(rows))[-1] - len(rows))
        outputs = {name: value.numpy() for name, value in signature(image_bytes=tf.constant(rows, tf.string)).items()}
        return [Prediction(**{n: outputs[n][i] for n in OUTPUTS if n in outputs}) for i in range(len(images))]


def _without_heatmap(signature: Callable[..., Any]) -> Callable[..., Any]:
    """The signature `explain` without its heatmap, which TensorFlow then does not compute."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "image_bytes")])
    def classify(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs = signature(image_bytes=image_bytes)
        return {name: outputs[name] for name in ("probabilities", "embedding")}

    return classify


def _check_operations(export: Export) -> None:
    """A SavedModel has no Python code, but its graph may read and write files; no export of kubetune does."""
    model = new_saved_model_proto()
    try:
        model.ParseFromString((export.folder / GRAPH).read_bytes())
    except Exception:  # DecodeError; its module is not public
        raise DataError(f"its {GRAPH} is damaged", key="model", value=export.address, fix="export again") from None
    forbidden = set()
    for part in model.meta_graphs:
        nodes = [*part.graph_def.node, *(n for f in part.graph_def.library.function for n in f.node_def)]
        forbidden |= {node.op for node in nodes} & FORBIDDEN
    if forbidden:
        raise DataError(
            f"not loaded: its graph has {', '.join(sorted(forbidden))}, which no classifier needs",
            key="model",
            value=export.address,
            fix="serve an export of kubetune",
        )


# Lines that TensorFlow adds around the message of an operation that fails inside a function.
_OF_THE_GRAPH = ("Graph execution error", "Detected at node", "<stack traces", "File ", "[[", "(1) ", "Error reported")


def _reason(error: tf.errors.OpError) -> str:
    """The first line about the image, without names of the graph."""
    lines = (line.strip() for line in (error.message or "").splitlines())
    text = next((line for line in lines if line and not line.startswith(_OF_THE_GRAPH)), "")
    return text.split("{{")[0].split("\t [[")[0].strip().rstrip(".")[:200] or "its pixels are invalid"
