"""Predict images in parts of constant size, each written atomically, so that a killed command continues after them."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.evaluation.scoring import rows_per_call
from trainer.predict.images import ImageFile, describe_versions, read_image
from trainer.predict.model import Model
from trainer.runs.folder import collect_versions, hash_source
from trainer.storage.arrays import pack, unpack
from trainer.storage.base import StoragePath
from trainer.storage.small_files import CONTENT_ERRORS

PART_IMAGES = 512  # a multiple of all batch sizes, so that the batches do not depend on where a start begins
READERS = 16  # threads that read and decode
PREFIX = ".parts-"  # of the folder of the parts in the output folder


@dataclass(frozen=True)
class Predicted:
    """Predictions for some images, in their order; NaN in the rows of an unreadable one."""

    probabilities: np.ndarray  # float32 [n, classes]
    distances: np.ndarray  # float64 [n]
    errors: tuple[str, ...]  # why an image cannot be read; "" if it can

    def encode(self) -> bytes:
        """Encode as the bytes of a part."""
        errors = np.frombuffer(json.dumps(self.errors).encode(), np.uint8)
        return pack({"probabilities": self.probabilities, "distances": self.distances, "errors": errors})


def decode_part(content: bytes, count: int, classes: int) -> Predicted | None:
    """Decode a part of `count` images; None if it is corrupt."""
    try:
        arrays = unpack(content)
        errors = tuple(map(str, json.loads(arrays["errors"].tobytes())))
        part = Predicted(arrays["probabilities"], arrays["distances"], errors)
    except CONTENT_ERRORS:
        return None
    shapes = (part.probabilities.shape, part.distances.shape, len(errors))
    kinds = (part.probabilities.dtype, part.distances.dtype)
    return part if (shapes, kinds) == (((count, classes), (count,), count), (np.float32, np.float64)) else None


def predict_images(
    model: Model, images: Sequence[ImageFile], flip: bool, on_batch: Callable[[int], None] = lambda _: None
) -> Predicted:
    """Predict images in batches; read and decode the next batch at the same time.

    Args:
        flip: average the probabilities of an image and of its mirror image.
        on_batch: called with the number of images after each batch; it can raise to stop.

    Raises:
        Interrupted: the bucket of the images does not respond.
    """
    rows, width = rows_per_call(), len(model.class_names)
    probabilities = np.full((len(images), width), np.nan, np.float32)
    distances, errors = np.full(len(images), np.nan), [""] * len(images)

    def load(image: ImageFile) -> Any:
        content = read_image(image)
        return content if isinstance(content, str) else model.prepare(content)

    with ThreadPoolExecutor(READERS) as pool:
        batches = [range(start, min(start + rows, len(images))) for start in range(0, len(images), rows)]
        loading: list[Future[Any]] = [pool.submit(load, images[i]) for i in batches[0]] if batches else []
        for batch, following in itertools.zip_longest(batches, batches[1:], fillvalue=range(0)):
            loaded = [future.result() for future in loading]
            loading = [pool.submit(load, images[i]) for i in following]
            readable = [k for k, item in enumerate(loaded) if not isinstance(item, str)]
            for k in set(range(len(loaded))) - set(readable):
                errors[batch[k]] = loaded[k]
            if readable:
                outputs, embeddings, failed = model.predict([loaded[k] for k in readable], flip)
                for k, row in enumerate(batch[r] for r in readable):
                    if k in failed:
                        errors[row] = failed[k]
                        continue
                    probabilities[row] = outputs[k]
                    if model.distance is not None and embeddings is not None:
                        distances[row] = model.distance.measure(embeddings[k : k + 1])[0]
            on_batch(len(batch))
    return Predicted(probabilities, distances, tuple(errors))


def identify(model: Model, images: Sequence[ImageFile], flip: bool) -> str:
    """Return a hash of everything that predictions depend on; parts of another hash are not used."""
    digest = hashlib.sha256()
    source = (model.identity, model.class_names, flip, PART_IMAGES, rows_per_call(), collect_versions(), hash_source())
    digest.update(repr(source).encode(errors="backslashreplace"))
    digest.update(json.dumps(describe_versions(images)).encode())
    return digest.hexdigest()[:16]


class Parts:
    """The parts of a prediction in its output folder, local or in a bucket."""

    def __init__(self, output: StoragePath, identity: str, count: int, classes: int) -> None:
        self.folder, self.count, self.classes = output / f"{PREFIX}{identity}", count, classes
        self._number = -(-count // PART_IMAGES)

    def __len__(self) -> int:
        return self._number

    def range_of(self, index: int) -> range:
        """Return the indices of the images of a part."""
        return range(index * PART_IMAGES, min((index + 1) * PART_IMAGES, self.count))

    def read(self, index: int) -> Predicted | None:
        """Read a part; None if it does not exist yet or is corrupt."""
        content = (self.folder / f"{index:06d}.npz").fetch()
        return content and decode_part(content[0], len(self.range_of(index)), self.classes)

    def write(self, index: int, part: Predicted) -> None:
        """Write a part atomically."""
        (self.folder / f"{index:06d}.npz").write(part.encode())

    def __iter__(self) -> Iterator[Predicted]:
        """Read the parts, all of which exist, one at a time."""
        for index in range(len(self)):
            part = self.read(index)
            assert part is not None, "written before"
            yield part

    def delete_all(self) -> None:
        """Delete the parts, and those of earlier commands with other images, model or options."""
        for folder in self.folder.parent.folders():
            if folder.name.startswith(PREFIX):
                folder.delete_tree()
