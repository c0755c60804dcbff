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

# A replica computes this many at once, whatever the batch: so workers and batch size change no bit.
ROWS = {"CPU": 32, "GPU": 128}
PIECE = 32 << 20  # bytes that a worker computes before all exchange theirs, about
DECODED_AHEAD = 256 << 20  # bytes of images, at the most: the first call takes a second, and cores would wait
CALLS = 8  # and the most calls of the device before that


def rows_at_once() -> int:
    """Images that a replica computes at once."""
    return ROWS["GPU" if tf.config.list_physical_devices("GPU") else "CPU"]


@dataclass
class FeatureRequest:
    """Features to compute at one cut."""

    cut: Cut
    features: Features
    needed: bool  # by the phase that begins; else for a later one, which can do without
    failed: bool = False  # there was no room


class FeaturePass:
    """Computes features of one split after the other; equal cuts are compiled once."""

    def __init__(self, worker: Worker, images: ImageStore, classifier: Classifier) -> None:
        self.worker, self.images, self.classifier = worker, images, classifier
        self.rows = rows_at_once() * worker.replicas
        self._compiled: dict[tuple[str, ...], Any] = {}

    def fill(self, wanted: Sequence[FeatureRequest], augmentation: Augmentation, exchanged: bool) -> bool:
        """Compute the missing features of one split; False where the run was asked to stop meanwhile.

        Each worker computes what it reads itself; where all read the same, it computes its part and they exchange.
        `FeatureRequest.failed` is set for this worker alone.

        Raises:
            DataError: an image cannot be read.
        """
        split, views = wanted[0].features.split, wanted[0].features.views
        missing = [[self._missing(one, view, exchanged) for view in range(views)] for one in wanted]
        some = []
        for one, of_views in zip(wanted, missing, strict=True):
            if np.any(of_views):
                some.append(one)
            elif one.needed:
                log.info(f"  features of {split.name}: taken from {one.features.where}, computed before")
        if not some:
            return True
        of_view = np.logical_or.reduce(missing)
        log.info(f"  features of {split.name}: {int(np.sum(of_view)):,} images to compute; kept in "
            + " and ".join(one.features.where for one in some))  # fmt: skip
        pixels = self.images.split(split.name)
        with data_errors(pixels):
            for view, chosen in enumerate(of_view):
                if chosen.any() and not self._fill_view(some, pixels, augmentation, exchanged, view, chosen):
                    return False
        return True

    def _missing(self, wanted: FeatureRequest, view: int, exchanged: bool) -> np.ndarray:
        """Examples that this worker, or any of those that read the same, lacks: bool [count]."""
        missing, control = wanted.features.missing(view), self.worker.control
        if not exchanged:
            return missing
        everyone = control.gather("missing features", np.packbits(missing).tobytes())
        union = np.zeros(0, np.uint8)
        if everyone:
            union = np.bitwise_or.reduce([np.frombuffer(one, np.uint8) for one in everyone])
        union = np.frombuffer(control.broadcast_bytes("missing features", union.tobytes()), np.uint8)
        return np.unpackbits(union, count=len(missing)).astype(bool)

    def _fill_view(
        self, wanted: Sequence[FeatureRequest], pixels: Pixels, augmentation: Augmentation, exchanged: bool, view: int,
        chosen: np.ndarray,
    ) -> bool:  # fmt: skip
        worker = self.worker
        parts = np.array_split(np.flatnonzero(chosen), worker.size if exchanged else 1)
        mine = parts[worker.index if exchanged else 0]
        calls = max(min(PIECE // (self.rows * max(w.features.row_bytes for w in wanted)), CALLS), 1)
        with closing(self._batches([one.cut for one in wanted], pixels, mine, augmentation, view)) as batches:
            for first in range(0, len(parts[0]), calls * self.rows):  # nobody has more than the first
                index = mine[first : first + calls * self.rows]
                made = [made for _, made in zip(range(0, len(index), self.rows), batches, strict=False)]
                if worker.should_stop("between features") if exchanged else worker.stop.reason is not None:
                    return False
                self._store_block(wanted, pixels, view, index, made, exchanged)
        return True

    def _batches(
        self, cuts: Sequence[Cut], pixels: Pixels, mine: np.ndarray, augmentation: Augmentation, view: int
    ) -> Generator[list[np.ndarray], None, None]:
        """Weights float32 [rows], 0 for no example, then the rows at each cut; ends early where the run should stop."""
        compute, local = self._compute(cuts), self.worker.strategy.experimental_local_results
        in_memory = pixels.array is not None and not augmentation.active
        source = self._from_memory(pixels, mine) if in_memory else self._live(pixels, mine, augmentation, view)
        with closing(source) as stream:
            for images, weights in stream:
                outcome = compute(images, weights)
                health.progress()
                # Not copied, as numpy() would.
                yield [_joined([np.asarray(part) for part in local(one)]) for one in outcome]

    def _live(
        self, pixels: Pixels, mine: np.ndarray, augmentation: Augmentation, view: int
    ) -> Generator[tuple[Any, Any], None, None]:
        """Images and weights of each call, out of the pipeline that training has."""
        replicas, one_view = self.worker.replicas, View(augmentation, self.images.config.seed, view)
        # Decode while the trunk is compiled, but not where shards have to be fetched.
        most = DECODED_AHEAD // (self.rows // replicas * self.classifier.image_size**2 * 3)
        ahead = None if pixels.shards else max(2 * replicas, min(most, -(-len(mine) // self.rows) * replicas))
        batches = chosen_batches(pixels, mine, rows=self.rows, replicas=replicas, view=one_view, prefetched=ahead)
        stream = iter(self.worker.strategy.distribute_datasets_from_function(lambda _: batches.dataset))
        gate = batches.gate()
        try:
            while self.worker.stop.reason is None:
                gate.wait_for(self.rows)
                batch = next(stream)
                yield batch["image"], batch["weight"]
        except StopRequested:  # while it waited for a shard
            return
        finally:
            gate.close()

    def _from_memory(self, pixels: Pixels, mine: np.ndarray) -> Generator[tuple[Any, Any], None, None]:
        """The same, straight out of the array: neighbours are not even copied."""
        content, blank, each = pixels.tensor(), pixels.split.count, self.rows // self.worker.replicas
        bad = list(pixels.bad)
        for first in range(0, len(mine), self.rows):
            if self.worker.stop.reason is not None:
                return
            index = np.full(self.rows, blank)
            chosen = mine[first : first + self.rows]
            index[: len(chosen)] = chosen
            weights = ((index < blank) & ~np.isin(index, bad)).astype(np.float32)

            def part(context: Any, index: np.ndarray = index, weights: np.ndarray = weights) -> tuple[Any, Any]:
                start = context.replica_id_in_sync_group % self.worker.replicas * each
                own = index[start : start + each]
                is_run = own[-1] - own[0] == each - 1 and own[-1] < blank
                images = content[own[0] : own[0] + each] if is_run else tf.gather(content, own)
                return images, tf.constant(weights[start : start + each])

            yield self.worker.strategy.experimental_distribute_values_from_function(part)

    def _compute(self, cuts: Sequence[Cut]) -> Any:
        """The compiled trunk: images, weights -> weights, then the features at each cut, as they are stored."""
        key = tuple(cut.layer for cut in cuts)
        if key not in self._compiled:
            trunk, strategy = Trunk(self.classifier, cuts), self.worker.strategy

            def replica(images: tf.Tensor, weights: tf.Tensor) -> list[tf.Tensor]:
                return [weights, *trunk.features(images)]

            self._compiled[key] = tf.function(lambda *batch: strategy.run(replica, args=batch), autograph=False)
        return self._compiled[key]

    def _store_block(
        self,
        wanted: Sequence[FeatureRequest],
        pixels: Pixels,
        view: int,
        index: np.ndarray,
        made: list,
        exchanged: bool,
    ) -> None:
        """Store a block of rows, this worker's or everyone's."""
        columns = [_joined(column)[: len(index)] for column in zip(*made, strict=True)]
        lost = index[columns[0] == 0] if columns else index
        why = np.array([pixels.bad.get(int(i), "") for i in lost] if len(lost) else [], str)
        rows = columns[1:] or [np.zeros((0, *one.features.shape), np.float32) for one in wanted]
        piece = {"index": index, "lost": lost, "why": why}
        piece |= {f"rows{n}": one.features.stored(part) for n, (one, part) in enumerate(zip(wanted, rows, strict=True))}
        if exchanged:
            everyone = self.worker.control.gather_arrays("features", piece)
            joined = {key: np.concatenate([part[key] for part in everyone]) for key in piece} if everyone else {}
            piece = self.worker.control.broadcast_arrays("features", joined)
        bad = {int(i): str(words) for i, words in zip(piece["lost"], piece["why"], strict=True)}
        for number, one in enumerate(wanted):
            try:
                if not one.failed:
                    one.features.write(view, piece["index"], piece[f"rows{number}"], bad)
            except OSError as error:
                one.failed = True
                log.info(f"  features cannot be kept in {one.features.where}: {error.strerror}")


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
