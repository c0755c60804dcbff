"""One pass over the images that computes the features of frozen trunks, on all workers at the same time."""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.cluster.worker import Worker
from trainer.config.schema import Augmentation
from trainer.data.images import ImageStore, Pixels, data_errors
from trainer.data.pipeline import View, chosen_batches
from trainer.errors import StopRequested
from trainer.features.cut import Cut, Trunk
from trainer.features.store import Features
from trainer.models.classifier import Classifier
from trainer.monitoring.health import health
from trainer.monitoring.log import log

# Images per replica and call, whatever the batch size, so that workers and batch size change no bit.
ROWS = {"CPU": 32, "GPU": 128}
BLOCK_BYTES = 32 << 20  # features that a worker computes before all workers exchange theirs, about
MAX_CALLS = 8  # device calls before that, at most
DECODED_AHEAD = 256 << 20  # limit in bytes of images decoded while the first call compiles


def rows_at_once() -> int:
    """Return the images per replica and call."""
    return ROWS["GPU" if tf.config.list_physical_devices("GPU") else "CPU"]


@dataclass
class FeatureRequest:
    """Features to compute at one cut."""

    cut: Cut
    features: Features
    needed: bool  # by the phase that begins; False: optional, for a later one
    failed: bool = False  # there was no room


Requests = Sequence[FeatureRequest]


class FeaturePass:
    """Computes features of one split after the other; equal cuts are compiled once."""

    def __init__(self, worker: Worker, images: ImageStore, classifier: Classifier) -> None:
        self.worker, self.images, self.classifier = worker, images, classifier
        self.rows = rows_at_once() * worker.replicas
        self._compiled: dict[tuple[str, ...], Any] = {}

    def fill(self, requests: Requests, augmentation: Augmentation, exchanged: bool) -> bool:
        """Compute the missing features of one split; False if the run should stop.

        Each worker computes what it reads. With `exchanged` all workers read the same: each computes its shard, and
        they exchange features. `FeatureRequest.failed` is set on this worker only.

        Raises:
            DataError: an image cannot be read.
        """
        split, views = requests[0].features.split, requests[0].features.views
        missing = [[self._missing(request, view, exchanged) for view in range(views)] for request in requests]
        incomplete = []
        for request, missing_in_views in zip(requests, missing, strict=True):
            if np.any(missing_in_views):
                incomplete.append(request)
            elif request.needed:
                log.info(f"  features of {split.name}: read from {request.features.where}, computed before")
        if not incomplete:
            return True
        missing_by_view = np.logical_or.reduce(missing)
        targets = " and ".join(request.features.where for request in incomplete)
        log.info(f"  features of {split.name}: {np.sum(missing_by_view):,} images to compute; stored in {targets}")
        pixels = self.images.split(split.name)
        with data_errors(pixels):
            for view, chosen in enumerate(missing_by_view):
                if chosen.any() and not self._fill_view(incomplete, pixels, augmentation, exchanged, view, chosen):
                    return False
        return True

    def _missing(self, request: FeatureRequest, view: int, exchanged: bool) -> np.ndarray:
        """Return the examples that this worker, or with `exchanged` any worker, lacks: bool [count]."""
        missing, control = request.features.missing(view), self.worker.control
        if not exchanged:
            return missing
        gathered = control.gather("missing features", np.packbits(missing).tobytes())
        arrays = [np.frombuffer(packed, np.uint8) for packed in gathered or [b""]]
        union = control.broadcast_bytes("missing features", np.bitwise_or.reduce(arrays).tobytes())
        return np.unpackbits(np.frombuffer(union, np.uint8), count=len(missing)).astype(bool)

    def _fill_view(
        self, requests: Requests, pixels: Pixels, augmentation: Augmentation, exchanged: bool, view: int,
        chosen: np.ndarray,
    ) -> bool:  # fmt: skip
        worker = self.worker
        shards = np.array_split(np.flatnonzero(chosen), worker.size if exchanged else 1)
        own = shards[worker.index if exchanged else 0]
        row_bytes = max(request.features.row_bytes for request in requests)
        calls = max(min(BLOCK_BYTES // (self.rows * row_bytes), MAX_CALLS), 1)
        with closing(self._batches([r.cut for r in requests], pixels, own, augmentation, view)) as batches:
            for first in range(0, len(shards[0]), calls * self.rows):  # the first shard is the largest
                index = own[first : first + calls * self.rows]
                outputs = [output for _, output in zip(range(0, len(index), self.rows), batches, strict=False)]
                if worker.should_stop("between features") if exchanged else worker.stop.reason is not None:
                    return False
                self._store_block(requests, pixels, view, index, outputs, exchanged)
        return True

    def _batches(
        self, cuts: Sequence[Cut], pixels: Pixels, own: np.ndarray, augmentation: Augmentation, view: int
    ) -> Generator[list[np.ndarray], None, None]:
        """Yield weights float32 [rows], 0 in padding, and the features at each cut; ends early on a stop request."""
        compute, local = self._compute(cuts), self.worker.strategy.experimental_local_results
        in_memory = pixels.array is not None and not augmentation.active
        source = self._from_memory(pixels, own) if in_memory else self._live(pixels, own, augmentation, view)
        with closing(source) as stream:
            for images, weights in stream:
                outputs = compute(images, weights)
                health.progress()
                # np.asarray does not copy, as numpy() does.
                yield [_joined([np.asarray(part) for part in local(output)]) for output in outputs]

    def _live(
        self, pixels: Pixels, own: np.ndarray, augmentation: Augmentation, view: int
    ) -> Generator[tuple[Any, Any], None, None]:
        replicas, one_view = self.worker.replicas, View(augmentation, self.images.config.seed, view)
        # Decode while the trunk is compiled, unless shards have to be fetched.
        limit = DECODED_AHEAD // (self.rows // replicas * self.classifier.image_size**2 * 3)
        ahead = 0 if pixels.shards else max(2 * replicas, min(limit, -(-len(own) // self.rows) * replicas))
        batches = chosen_batches(pixels, own, rows=self.rows, replicas=replicas, view=one_view, prefetched=ahead)
        stream = iter(self.worker.strategy.distribute_datasets_from_function(lambda _: batches.dataset))
        gate = batches.gate()
        try:
            while self.worker.stop.reason is None:
                gate.wait_for(self.rows)
                batch = next(stream)
                yield batch["image"], batch["weight"]
        except StopRequested:  # while waiting for a shard
            return
        finally:
            gate.close()

    def _from_memory(self, pixels: Pixels, own: np.ndarray) -> Generator[tuple[Any, Any], None, None]:
        """Yield images and weights of each call from the array; consecutive images are not copied."""
        content, padding, per_replica = pixels.tensor(), pixels.split.count, self.rows // self.worker.replicas
        bad = list(pixels.bad)
        for first in range(0, len(own), self.rows):
            if self.worker.stop.reason is not None:
                return
            chosen = own[first : first + self.rows]
            index = np.pad(chosen, (0, self.rows - len(chosen)), constant_values=padding)
            weights = ((index < padding) & ~np.isin(index, bad)).astype(np.float32)

            def part(context: Any, index: np.ndarray = index, weights: np.ndarray = weights) -> tuple[Any, Any]:
                start = context.replica_id_in_sync_group % self.worker.replicas * per_replica
                rows = index[start : start + per_replica]
                is_consecutive = rows[-1] - rows[0] == per_replica - 1 and rows[-1] < padding
                images = content[rows[0] : rows[0] + per_replica] if is_consecutive else tf.gather(content, rows)
                return images, tf.constant(weights[start : start + per_replica])

            yield self.worker.strategy.experimental_distribute_values_from_function(part)

    def _compute(self, cuts: Sequence[Cut]) -> Any:
        """Return the compiled trunk: images, weights -> weights, then the features at each cut."""
        key = tuple(cut.layer for cut in cuts)
        if key not in self._compiled:
            trunk, strategy = Trunk(self.classifier, cuts), self.worker.strategy

            def replica(images: tf.Tensor, weights: tf.Tensor) -> list[tf.Tensor]:
                return [weights, *trunk.features(images)]

            self._compiled[key] = tf.function(lambda *batch: strategy.run(replica, args=batch), autograph=False)
        return self._compiled[key]

    def _store_block(
        self, requests: Requests, pixels: Pixels, view: int, index: np.ndarray, outputs: list, exchanged: bool
    ) -> None:
        columns = [_joined(column)[: len(index)] for column in zip(*outputs, strict=True)]
        failed = index[columns[0] == 0] if columns else index
        reasons = np.array([pixels.bad.get(int(i), "") for i in failed] if len(failed) else [], str)
        rows = columns[1:] or [np.zeros((0, *request.features.shape), np.float32) for request in requests]
        block = {"index": index, "failed": failed, "reasons": reasons}
        for number, (request, values) in enumerate(zip(requests, rows, strict=True)):
            block[f"rows{number}"] = request.features.stored(values)
        if exchanged:
            gathered = self.worker.control.gather_arrays("features", block)
            joined = {key: np.concatenate([part[key] for part in gathered]) for key in block} if gathered else {}
            block = self.worker.control.broadcast_arrays("features", joined)
        bad = {int(i): str(reason) for i, reason in zip(block["failed"], block["reasons"], strict=True)}
        for number, request in enumerate(requests):
            try:
                if not request.failed:
                    request.features.write(view, block["index"], block[f"rows{number}"], bad)
            except OSError as error:
                request.failed = True
                log.info(f"  features cannot be stored in {request.features.where}: {error.strerror}")


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
