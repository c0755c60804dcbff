"""Compute the frozen layers of a network on a CPU with LiteRT instead of TensorFlow, in about half the time.

LiteRT's XNNPACK has faster kernels than TensorFlow for the depthwise and 1 x 1 convolutions of mobile networks. Each
image is computed alone, so that its features depend neither on the other images of a batch nor on the number of
threads.
"""

import contextlib
import io
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.features.cut import Cut, Tail, Trunk
from trainer.models.classifier import Classifier
from trainer.monitoring.log import suppress_litert_output

MAX_WEIGHT_BYTES = 512 << 20  # maximum size of the weights in all interpreters; each has a copy of the trunk's weights


class LiteRTTrunk:
    """The layers below one or more cuts of a classifier, for inference on the CPU, in float32.

    The constructor copies the layers' variables, so they must not change later. Calls from several threads are safe.
    """

    def __init__(self, classifier: Classifier, cuts: Sequence[Cut], threads: int) -> None:
        """Convert the layers, which takes a second or a few. `threads`: images that are computed at the same time."""
        from ai_edge_litert.interpreter import Interpreter  # imported here, as most runs do not need it

        content = _convert(classifier, cuts)
        self.shapes = tuple(cut.shape for cut in cuts)
        self._interpreters: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.threads = max(min(threads, MAX_WEIGHT_BYTES // len(content)), 1)
        with suppress_litert_output():
            for _ in range(self.threads):
                interpreter = Interpreter(model_content=content, num_threads=1)
                interpreter.allocate_tensors()
                self._interpreters.put(interpreter)
        self._input = interpreter.get_input_details()[0]["index"]
        self._outputs = [detail["index"] for detail in interpreter.get_output_details()]
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="litert")

    def features(self, images: np.ndarray) -> list[np.ndarray]:
        """Return the features at each cut, float32 [b, *shape], for images [b, S, S, 3] of any dtype in 0..255."""
        outputs = [np.empty((len(images), *shape), np.float32) for shape in self.shapes]

        def compute(first: int) -> None:
            interpreter = self._interpreters.get()
            try:
                for row in range(first, len(images), self.threads):
                    interpreter.set_tensor(self._input, images[row : row + 1].astype(np.float32))
                    interpreter.invoke()
                    for output, index in zip(outputs, self._outputs, strict=True):
                        output[row] = interpreter.get_tensor(index)[0]
            finally:
                self._interpreters.put(interpreter)

        list(self._pool.map(compute, range(min(self.threads, len(images)))))
        return outputs


def _convert(classifier: Classifier, cuts: Sequence[Cut]) -> bytes:
    """Return the layers below the cuts as a .tflite model: image, float32 [1, S, S, 3] -> features at each cut."""
    size = classifier.image_size
    trunk = Trunk(classifier, cuts)
    spec = [tf.TensorSpec([1, size, size, 3], tf.float32, "image")]
    features = tf.function(trunk.features, input_signature=spec, autograph=False).get_concrete_function()
    converter = tf.lite.TFLiteConverter.from_concrete_functions([features], classifier.backbone)
    converter.experimental_lower_to_saved_model = False  # weights stay constants
    with contextlib.redirect_stdout(io.StringIO()), suppress_litert_output():
        content: bytes = converter.convert()
    return content


class LiteRTClassifier(Tail):
    """A network on images whose frozen layers, below a cut, are computed by LiteRT; only its tail can be trained."""

    def __init__(self, classifier: Classifier, cut: Cut, trunk: LiteRTTrunk) -> None:
        """Build the tail above `cut`. `trunk` has the layers below it."""
        super().__init__(classifier, cut)
        self.trunk = trunk

    def logits(self, images: Any, **options: Any) -> Any:
        """Return the logits, float32 [b, classes], for images [b, S, S, 3] in 0..255. See `Network.logits`."""
        features = tf.numpy_function(lambda pixels: self.trunk.features(pixels)[0], [images], tf.float32)
        return super().logits(tf.ensure_shape(features, [images.shape[0], *self.cut.shape]), **options)
