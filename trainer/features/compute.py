"""Compute and store the features of a split in one pass over its images, in parallel on all workers."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.cluster.worker import Worker
from trainer.config.schema import Augmentation
from trainer.data.host import count_usable_cpus
from trainer.data.images import ImageStore, Pixels, convert_data_errors
from trainer.data.order import split_by_device_calls
from trainer.data.pipeline import EpochAugmentation, build_indexed_batches
from trainer.errors import StopRequested
from trainer.evaluation.scoring import get_images_per_call
from trainer.features.cut import Cut, Trunk
from trainer.features.litert import LiteRTTrunk
from trainer.features.plan import TrunkEngine
from trainer.features.store import Features
from trainer.models.classifier import Classifier
from trainer.monitoring.health import health
from trainer.monitoring.log import log

# A block is the set of features that a worker computes, exchanges with other workers and stores at once.
BLOCK_BYTES = 32 << 20  # approximate maximum size of a block
MAX_CALLS_PER_BLOCK = 8  # maximum number of device calls whose outputs form a block
MAX_DECODED_BYTES = 256 << 20  # maximum total size of the images that are decoded while the trunk is compiled


@dataclass
class FeatureRequest:
    """A request to compute the features at one cut."""

    cut: Cut
    features: Features  # where the results are stored
    required: bool  # whether the phase that starts now needs the features; features for a later phase are optional
    failed: bool = False  # whether this worker could not store the features


Requests = Sequence[FeatureRequest]


class FeaturePass:
    """Computes and stores the features of one split in each call of `compute_missing`.

    The trunk below a set of cuts is compiled, or converted for LiteRT, once.
    """

    def __init__(self, worker: Worker, images: ImageStore, classifier: Classifier, engine: TrunkEngine) -> None:
        self.worker, self.images, self.classifier, self.engine = worker, images, classifier, engine
        self.images_per_call = get_images_per_call() * worker.replicas  # on all replicas of this worker together
        self._compiled: dict[tuple[str, ...], Any] = {}
        self._converted: dict[tuple[str, ...], LiteRTTrunk] = {}

    def compute_missing(self, requests: Requests, augmentation: Augmentation, exchange: bool) -> bool:
        """Compute and store the missing features of one split. With `exchange`, all workers must call this together.

        If this worker cannot store a request's features, it sets the request's `failed`. It does not inform the other
        workers.

        Args:
            requests: requests with different cuts, the same split and the same number of views.
            augmentation: applied to the images, differently in each view.
            exchange: whether all workers read the same features. If so, each worker computes a shard of them, and the
                workers exchange the results. Otherwise, each worker computes the features that it reads.

        Returns:
            True if no features are missing, except those of failed requests. False if the run should stop.

        Raises:
            DataError: an image cannot be read, or a feature is too large for float16.
        """
        split, views = requests[0].features.split, requests[0].features.views
        is_missing = [[self._find_missing(request, view, exchange) for view in range(views)] for request in requests]
        incomplete_requests = []
        for request, is_missing_in_views in zip(requests, is_missing, strict=True):
            if np.any(is_missing_in_views):
                incomplete_requests.append(request)
            elif request.required:
                log.info(f"  features of {split.name}: read from {request.features.location}, computed before")
        if not incomplete_requests:
            return True
        is_missing_by_view = np.logical_or.reduce(is_missing)
        locations = " and ".join(request.features.location for request in incomplete_requests)
        log.info(f"  features of {split.name}: {np.sum(is_missing_by_view):,} images to compute; stored in {locations}")
        pixels = self.images.open_split(split.name)
        with convert_data_errors(pixels):
            return all(
                self._fill_view(incomplete_requests, pixels, augmentation, exchange, view, is_missing_in_view)
                for view, is_missing_in_view in enumerate(is_missing_by_view)
                if is_missing_in_view.any()
            )

    def _find_missing(self, request: FeatureRequest, view: int, exchange: bool) -> np.ndarray:
        """Return which examples lack features on this worker or, with `exchange`, on any worker, as bool [count]."""
        is_missing = request.features.find_missing(view)
        control = self.worker.control
        if not exchange:
            return is_missing
        gathered = control.gather("missing features", np.packbits(is_missing).tobytes())
        arrays = [np.frombuffer(packed, np.uint8) for packed in gathered or [b""]]
        union = control.broadcast_bytes("missing features", np.bitwise_or.reduce(arrays).tobytes())
        return np.unpackbits(np.frombuffer(union, np.uint8), count=len(is_missing)).astype(bool)

    def _fill_view(
        self, requests: Requests, pixels: Pixels, augmentation: Augmentation, exchange: bool, view: int,
        is_missing: np.ndarray,
    ) -> bool:  # fmt: skip
        """Compute and store features in one view, in blocks. Return False if the run should stop.

        `is_missing`, bool [count], selects the examples.
        """
        worker = self.worker
        shards = split_by_device_calls(np.flatnonzero(is_missing), self.images_per_call, worker.size if exchange else 1)
        shard = shards[worker.index if exchange else 0]
        row_bytes = max(request.features.row_bytes for request in requests)
        calls_per_block = max(min(BLOCK_BYTES // (self.images_per_call * row_bytes), MAX_CALLS_PER_BLOCK), 1)
        block_images = calls_per_block * self.images_per_call
        health.record_progress(0, len(shards[0]))
        with closing(self._compute_batches([r.cut for r in requests], pixels, shard, augmentation, view)) as batches:
            # No shard is larger than the first one, so all workers exchange the same number of blocks.
            for first in range(0, len(shards[0]), block_images):
                indices = shard[first : first + block_images]
                outputs = [
                    output for _, output in zip(range(0, len(indices), self.images_per_call), batches, strict=False)
                ]
                if worker.should_stop("between features") if exchange else worker.stop.reason is not None:
                    return False
                self._store_block(requests, pixels, view, indices, outputs, exchange)
                health.record_progress(min(first + block_images, len(shards[0])), len(shards[0]))
        return True

    def _compute_batches(
        self, cuts: Sequence[Cut], pixels: Pixels, shard: np.ndarray, augmentation: Augmentation, view: int
    ) -> Generator[list[np.ndarray], None, None]:
        """Yield each device call's outputs: weights, float32 [rows], and for each cut its features [rows, *shape].

        The weight is 0 for padding and for images that cannot be read, otherwise 1. A stop request ends the iteration
        early.
        """
        compute = self._compile_trunk(cuts)
        if pixels.array is not None and not augmentation.active:
            source = self._iterate_cached_images(pixels, shard)
        else:
            source = self._iterate_decoded_images(pixels, shard, augmentation, view)
        with closing(source) as stream:
            for images, weights in stream:
                outputs = compute(images, weights)
                health.record_progress()
                yield outputs

    def _iterate_decoded_images(
        self, pixels: Pixels, shard: np.ndarray, augmentation: Augmentation, view: int
    ) -> Generator[tuple[Any, Any], None, None]:
        """Yield the images and weights of each device call, from an input pipeline that decodes and augments images."""
        replicas = self.worker.replicas
        view_settings = EpochAugmentation(augmentation, self.images.config.seed, view)
        # Decode many batches while the trunk is compiled. If shards have to be fetched, prefetch only the default (0).
        max_batches = MAX_DECODED_BYTES // (self.images_per_call // replicas * self.classifier.image_size**2 * 3)
        num_batches = -(-len(shard) // self.images_per_call) * replicas
        num_prefetched = 0 if pixels.shards else max(2 * replicas, min(max_batches, num_batches))
        batches = build_indexed_batches(
            pixels,
            shard,
            rows_per_batch=self.images_per_call,
            num_replicas=replicas,
            view=view_settings,
            num_prefetched=num_prefetched,
        )
        stream = iter(self.worker.strategy.distribute_datasets_from_function(lambda _: batches.dataset))
        gate = batches.open_gate()
        try:
            while self.worker.stop.reason is None:
                gate.wait_for(self.images_per_call)
                batch = next(stream)
                yield batch["image"], batch["weight"]
        except StopRequested:  # raised by `wait_for` while a shard is fetched
            return
        finally:
            gate.close()

    def _iterate_cached_images(self, pixels: Pixels, shard: np.ndarray) -> Generator[tuple[Any, Any], None, None]:
        """Yield the images and weights of each device call, from the image cache. Consecutive images are not copied."""
        all_images = pixels.tensor()
        padding_index = pixels.split.count
        per_replica = self.images_per_call // self.worker.replicas
        unreadable_indices = list(pixels.unreadable)
        for first in range(0, len(shard), self.images_per_call):
            if self.worker.stop.reason is not None:
                return
            indices = shard[first : first + self.images_per_call]
            index = np.pad(indices, (0, self.images_per_call - len(indices)), constant_values=padding_index)
            weights = ((index < padding_index) & ~np.isin(index, unreadable_indices)).astype(np.float32)

            def on_replica(context: Any, index: np.ndarray = index, weights: np.ndarray = weights) -> tuple[Any, Any]:
                start = context.replica_id_in_sync_group % self.worker.replicas * per_replica
                rows = index[start : start + per_replica]
                is_consecutive = rows[-1] - rows[0] == per_replica - 1 and rows[-1] < padding_index
                images = all_images[rows[0] : rows[0] + per_replica] if is_consecutive else tf.gather(all_images, rows)
                return images, tf.constant(weights[start : start + per_replica])

            yield self.worker.strategy.experimental_distribute_values_from_function(on_replica)

    def convert_trunk(self, cuts: Sequence[Cut]) -> LiteRTTrunk:
        """Return the layers below the cuts, converted for LiteRT in the first call with these cuts."""
        key = tuple(cut.layer for cut in cuts)
        if key not in self._converted:
            self._converted[key] = LiteRTTrunk(self.classifier, cuts, count_usable_cpus())
        return self._converted[key]

    def _compile_trunk(self, cuts: Sequence[Cut]) -> Callable[[Any, Any], list[np.ndarray]]:
        """Return a function that maps a device call's images and weights to the weights and the features at each cut.

        Its results are the values of all replicas of this worker, float32 [rows, ...].
        """
        local_results = self.worker.strategy.experimental_local_results

        def join_replicas(values: Any) -> np.ndarray:
            return _concatenate([np.asarray(value) for value in local_results(values)])  # .numpy() would copy

        if self.engine == "litert":
            converted = self.convert_trunk(cuts)
            return lambda images, weights: [join_replicas(weights), *converted.features(join_replicas(images))]
        key = tuple(cut.layer for cut in cuts)
        if key not in self._compiled:
            trunk = Trunk(self.classifier, cuts)
            strategy = self.worker.strategy

            def replica(images: tf.Tensor, weights: tf.Tensor) -> list[tf.Tensor]:
                return [weights, *trunk.features(images)]

            self._compiled[key] = tf.function(lambda *batch: strategy.run(replica, args=batch), autograph=False)
        compiled = self._compiled[key]
        return lambda images, weights: [join_replicas(values) for values in compiled(images, weights)]

    def _store_block(
        self, requests: Requests, pixels: Pixels, view: int, index: np.ndarray, outputs: list, exchange: bool
    ) -> None:
        """Store the features in a block and, with `exchange`, in the blocks that other workers computed.

        `index`, int64 [n], contains the block's example indices. `outputs` are what `_compute_batches` yielded
        for them.
        """
        columns = [_concatenate(column)[: len(index)] for column in zip(*outputs, strict=True)]
        unreadable_indices = index[columns[0] == 0] if columns else index
        # `pixels.unreadable` reads a file, so only if there are any.
        unreadable = pixels.unreadable if len(unreadable_indices) else {}
        reasons = np.array([unreadable.get(int(i), "") for i in unreadable_indices], str)
        features = columns[1:] or [np.zeros((0, *request.features.shape), np.float32) for request in requests]
        block = {"index": index, "failed": unreadable_indices, "reasons": reasons}
        for i, (request, values) in enumerate(zip(requests, features, strict=True)):
            block[f"rows{i}"] = request.features.encode(values)
        if exchange:
            blocks = self.worker.control.gather_arrays("features", block)
            joined_block = {key: np.concatenate([arrays[key] for arrays in blocks]) for key in block} if blocks else {}
            block = self.worker.control.broadcast_arrays("features", joined_block)
        block_unreadable = {int(i): str(reason) for i, reason in zip(block["failed"], block["reasons"], strict=True)}
        for i, request in enumerate(requests):
            try:
                if not request.failed:
                    request.features.write(view, block["index"], block[f"rows{i}"], block_unreadable)
            except OSError as error:
                request.failed = True
                log.info(f"  features cannot be stored in {request.features.location}: {error.strerror}")


def _concatenate(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenate arrays along axis 0. A single array is not copied."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
