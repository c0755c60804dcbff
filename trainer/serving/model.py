"""The SavedModel as the server asks it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.errors import DataError
from trainer.private_api import new_saved_model_proto
from trainer.serving.export_files import GRAPH, Answer, Export, Unreadable
from trainer.serving.settings import batch_sizes

# What `saved_model_cli scan` warns of, and calls into Python: no classifier needs them.
FORBIDDEN = {"ReadFile", "WriteFile", "PrintV2", "PyFunc", "PyFuncStateless", "EagerPyFunc"}
BYTES, EXPLAIN = "image_bytes", "explain"
OUTPUTS = ("probabilities", "embedding", "heatmap")


class ServedModel:
    """An export that was loaded. Asked by one thread at a time.

    Raises:
        DataError: it cannot be loaded, is no classifier of its labels, or holds operations that no export has.
    """

    def __init__(self, export: Export) -> None:
        self.export = export
        _check_operations(export)
        try:
            self._loaded = tf.saved_model.load(str(export.folder))  # signatures live only as long as this
        except Exception as error:  # a damaged file shows as almost anything
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"model={export.address} cannot be loaded ({text}); export again") from None
        signatures = self._loaded.signatures
        if BYTES not in signatures:
            raise DataError(f"model={export.address} has no signature {BYTES}, so kubetune did not export it")
        width = signatures[BYTES].structured_outputs["probabilities"].shape[-1]
        if width != len(export.classes):
            raise DataError(
                f"model={export.address} answers {width} probabilities and names {len(export.classes)} classes; export "
                "again"
            )
        side = signatures["images"].structured_input_signature[1]["images"].shape[1] if "images" in signatures else 1
        self._blank = tf.io.encode_jpeg(np.zeros([side, side, 3], np.uint8)).numpy()
        self._explain = signatures.get(EXPLAIN)
        self._classify = _without_heatmap(self._explain) if self._explain else signatures[BYTES]
        own = (export.reference or {}).get("embedding")
        if own and self._explain:
            width = self._explain.structured_outputs["embedding"].shape[-1]
            if width != len(own.get("projection") or own["mean"]):
                raise DataError(f"model={export.address}: its reference.json is of another model; export again")
        # Each new size of a batch costs a GPU a search for the fastest kernels; a CPU takes any.
        self._fill = bool(tf.config.list_physical_devices("GPU"))

    @property
    def explains(self) -> bool:
        """Whether the export has the signature `explain`."""
        return self._explain is not None

    def classify(self, images: Sequence[bytes]) -> list[Answer | Unreadable]:
        """One answer for each encoded image; one that cannot be decoded does not spoil those of the others."""
        return self._asked(self._classify, images)

    def explain(self, images: Sequence[bytes]) -> list[Answer | Unreadable]:
        """The same with heatmaps."""
        assert self._explain is not None, "check `explains` first"
        return self._asked(self._explain, images)

    def warm_up(self, largest: int) -> list[int]:
        """Ask once for every size that batches are filled up to: no request waits for that. Returns the sizes."""
        for size in (sizes := batch_sizes(largest)):
            for signature in filter(None, (self._classify, self._explain)):
                self._call(signature, [self._blank] * size)
        return sizes

    def _asked(self, signature: Callable[..., Any], images: Sequence[bytes]) -> list[Answer | Unreadable]:
        try:
            return self._call(signature, images)
        except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError, tf.errors.OutOfRangeError) as error:
            if len(images) == 1:
                return [Unreadable(_reason(error))]
        half = len(images) // 2
        return self._asked(signature, images[:half]) + self._asked(signature, images[half:])

    def _call(self, signature: Callable[..., Any], images: Sequence[bytes]) -> list[Answer | Unreadable]:
        rows = list(images)
        if self._fill:
            rows += [self._blank] * (batch_sizes(len(rows))[-1] - len(rows))
        outputs = {name: value.numpy() for name, value in signature(image_bytes=tf.constant(rows, tf.string)).items()}
        return [Answer(**{name: outputs[name][i] for name in OUTPUTS if name in outputs}) for i in range(len(images))]


def _without_heatmap(signature: Callable[..., Any]) -> Callable[..., Any]:
    """The signature `explain` without its heatmap, which is then not computed."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "image_bytes")])
    def classify(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs = signature(image_bytes=image_bytes)
        return {name: outputs[name] for name in ("probabilities", "embedding")}

    return classify


def _check_operations(export: Export) -> None:
    """A SavedModel holds no Python, but a graph may read and write files: none that kubetune exports does."""
    model = new_saved_model_proto()
    try:
        model.ParseFromString((export.folder / GRAPH).read_bytes())
    except Exception:  # DecodeError; its module is not public
        raise DataError(f"model={export.address}: {export.folder / GRAPH} is damaged; export again") from None
    forbidden = set()
    for part in model.meta_graphs:
        nodes = [*part.graph_def.node, *(n for f in part.graph_def.library.function for n in f.node_def)]
        forbidden |= {node.op for node in nodes} & FORBIDDEN
    if forbidden:
        raise DataError(
            f"model={export.address} holds the operations {', '.join(sorted(forbidden))}, which no classifier needs; "
            "it is not loaded"
        )


# What TensorFlow puts around the sentence of an operation that fails inside a function.
_OF_THE_GRAPH = ("Graph execution error", "Detected at node", "<stack traces", "File ", "[[", "(1) ", "Error reported")


def _reason(error: tf.errors.OpError) -> str:
    """The first sentence that speaks of the image, without the graph's own names."""
    lines = (line.strip() for line in (error.message or "").splitlines())
    text = next((line for line in lines if line and not line.startswith(_OF_THE_GRAPH)), "")
    return text.split("{{")[0].split("\t [[")[0].strip().rstrip(".")[:200] or "its pixels cannot be decoded"
