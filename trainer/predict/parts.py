"""Predict images in parts of constant size. Each part is written atomically, so that a killed command can resume."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.evaluation.scoring import get_images_per_call
from trainer.predict.images import ImageFile, describe_versions, read_image
from trainer.predict.model import Model
from trainer.runs.folder import collect_versions, hash_source
from trainer.storage.arrays import pack, unpack
from trainer.storage.base import StoragePath
from trainer.storage.small_files import CONTENT_ERRORS

PART_IMAGES = 512  # images per part; a multiple of the batch sizes, so that a resumed command has the same batches
READERS = 16  # threads that read and decode images
PREFIX = ".parts-"  # prefix of the name of the parts' folder, which is in the output folder


@dataclass(frozen=True)
class ImagePredictions:
    """Predictions for n images, in the order of the images."""

    probabilities: np.ndarray  # float32 [n, classes]; NaN for an unreadable image
    distances: np.ndarray  # float64 [n]; NaN for an unreadable image, or if the model has no distance
    errors: tuple[str, ...]  # [n]: reason why the image cannot be read; "" if it can

    def encode(self) -> bytes:
        """Return the content of a part's file."""
        errors = np.frombuffer(json.dumps(self.errors).encode(), np.uint8)
        return pack({"probabilities": self.probabilities, "distances": self.distances, "errors": errors})


def decode_part(content: bytes, num_images: int, num_classes: int) -> ImagePredictions | None:
    """Decode the file of a part with `num_images` images and `num_classes` classes. Return None if it is corrupt."""
    try:
        arrays = unpack(content)
        errors = tuple(map(str, json.loads(arrays["errors"].tobytes())))
        part = ImagePredictions(arrays["probabilities"], arrays["distances"], errors)
    except CONTENT_ERRORS:
        return None
    shapes = (part.probabilities.shape, part.distances.shape, len(errors))
    dtypes = (part.probabilities.dtype, part.distances.dtype)
    expected_shapes = ((num_images, num_classes), (num_images,), num_images)
    return part if (shapes, dtypes) == (expected_shapes, (np.float32, np.float64)) else None


def predict_images(
    model: Model, images: Sequence[ImageFile], flip: bool, on_batch: Callable[[int], None] = lambda _: None
) -> ImagePredictions:
    """Predict images in batches. While a batch is predicted, the next one is read and decoded.

    Args:
        flip: average the probabilities of each image and its mirror image.
        on_batch: called with the number of images of each batch, after the batch; can raise to stop.

    Raises:
        Interrupted: the images' bucket does not respond.
    """
    rows = get_images_per_call()
    width = len(model.class_names)
    probabilities = np.full((len(images), width), np.nan, np.float32)
    distances = np.full(len(images), np.nan)
    errors = [""] * len(images)

    def load(image: ImageFile) -> Any:
        content = read_image(image)
        return content if isinstance(content, str) else model.prepare(content)

    with ThreadPoolExecutor(READERS) as pool:
        batches = [range(start, min(start + rows, len(images))) for start in range(0, len(images), rows)]
        futures: list[Future[Any]] = [pool.submit(load, images[i]) for i in batches[0]] if batches else []
        for batch, next_batch in itertools.zip_longest(batches, batches[1:], fillvalue=range(0)):
            inputs = [future.result() for future in futures]
            futures = [pool.submit(load, images[i]) for i in next_batch]
            readable_rows = [k for k, item in enumerate(inputs) if not isinstance(item, str)]
            for k in set(range(len(inputs))) - set(readable_rows):
                errors[batch[k]] = inputs[k]
            if readable_rows:
                outputs, embeddings, reasons = model.predict([inputs[k] for k in readable_rows], flip)
                for k, row in enumerate(batch[r] for r in readable_rows):
                    if k in reasons:
                        errors[row] = reasons[k]
                        continue
                    probabilities[row] = outputs[k]
                    if model.distance is not None and embeddings is not None:
                        distances[row] = model.distance.measure(embeddings[k : k + 1])[0]
            on_batch(len(batch))
    return ImagePredictions(probabilities, distances, tuple(errors))


def compute_parts_identity(model: Model, images: Sequence[ImageFile], flip: bool) -> str:
    """Return a hash, 16 hex digits, of everything that predictions depend on. Only parts with this hash are used."""
    digest = hashlib.sha256()
    inputs = (
        model.identity,
        model.class_names,
        flip,
        PART_IMAGES,
        get_images_per_call(),
        collect_versions(),
        hash_source(),
    )
    digest.update(repr(inputs).encode(errors="backslashreplace"))
    digest.update(json.dumps(describe_versions(images)).encode())
    return digest.hexdigest()[:16]


class Parts:
    """The parts of a prediction: a file per part, in a folder in the output folder, local or in a bucket."""

    def __init__(self, output: StoragePath, identity: str, count: int, classes: int) -> None:
        """Write nothing yet. `identity`: result of `compute_parts_identity`. `count`: number of images in all parts."""
        self.folder, self.count, self.classes = output / f"{PREFIX}{identity}", count, classes
        self._num_parts = -(-count // PART_IMAGES)

    def __len__(self) -> int:
        return self._num_parts

    def get_image_indices(self, index: int) -> range:
        """Return the indices of a part's images in the list of all images."""
        return range(index * PART_IMAGES, min((index + 1) * PART_IMAGES, self.count))

    def read(self, index: int) -> ImagePredictions | None:
        """Read a part. Return None if it does not exist yet or is corrupt."""
        content = (self.folder / f"{index:06d}.npz").fetch()
        return content and decode_part(content[0], len(self.get_image_indices(index)), self.classes)

    def write(self, index: int, part: ImagePredictions) -> None:
        """Write a part atomically."""
        (self.folder / f"{index:06d}.npz").write(part.encode())

    def __iter__(self) -> Iterator[ImagePredictions]:
        """Read the parts one after another. All parts must exist."""
        for index in range(len(self)):
            part = self.read(index)
            assert part is not None, "written before"
            yield part

    def delete_all(self) -> None:
        """Delete these parts, and parts of earlier commands with other images, another model or other options."""
        for folder in self.folder.parent.folders():
            if folder.name.startswith(PREFIX):
                folder.delete_tree()
