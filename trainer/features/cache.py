"""Features of a run's phases: those that earlier starts left on the disk, completed by all workers."""

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import tensorflow as tf

from trainer.cluster.worker import Worker
from trainer.config.schema import Augmentation
from trainer.data.images import ImageStore, cache_name
from trainer.data.pipeline import examples_to_score
from trainer.data.sharding import Sharding, own_examples
from trainer.features.compute import FeaturePass, FeatureRequest, rows_at_once
from trainer.features.plan import FeaturePlan, stored_dtype
from trainer.features.store import Features, open_features
from trainer.models.classifier import Classifier
from trainer.monitoring.log import log

_FORMAT = 2  # of features on disk; counts up when they change


class FeatureCache:
    """Opens the features of one phase after the other."""

    def __init__(
        self, worker: Worker, images: ImageStore, classifier: Classifier, plan: FeaturePlan, sharding: Sharding
    ) -> None:
        self.worker, self.images, self.classifier, self.plan, self.sharding = worker, images, classifier, plan, sharding
        self.config = images.config

    def open(self, phase: str, splits: Sequence[str]) -> list[Features] | None:
        """The features of these splits for a phase, complete; None where a worker has no room, or was asked to stop.

        Those that later phases will want, and that stay what they are until then, are computed in the same pass.

        Raises:
            DataError: an image cannot be read.
        """
        compute = FeaturePass(self.worker, self.images, self.classifier)
        opened: list[Features] = []
        for split in splits:
            taken = sum(features.bytes for features in opened if features.kept == "memory")
            features = self._open(phase, split, self.images.memory_left - taken)
            if self.worker.control.any_worker("no room for features", features is None):
                return None
            assert features is not None
            requests = [FeatureRequest(self.plan.cut(phase), features, needed=True)]
            for later in self._later_phases_in_same_pass(phase, split):
                # On disk alone, beside what is needed now: it is not known whether there will be memory for it.
                more = self._open(later, split, -1, beside=sum(r.features.bytes for r in requests))
                if not self.worker.control.any_worker("no room for later features", more is None) and more is not None:
                    requests.append(FeatureRequest(self.plan.cut(later), more, needed=False))
            exchanged = split == "train" and self.sharding.by == "record" and self.worker.size > 1
            augmentation = self.config.augmentation if split == "train" else Augmentation()
            done = compute.fill(requests, augmentation, exchanged)
            if self.worker.control.any_worker("features not done", not done or requests[0].failed):
                return None
            features.complete()
            if features.bad:
                self.images.split(split).known_bad |= features.bad
            opened.append(features)
        return opened

    def _later_phases_in_same_pass(self, phase: str, split: str) -> list[str]:
        """The phases after this one that read the same views of a split, as features that stay what they are."""
        names, phases, reads = list(self.config.phases), self.config.phases, self.plan.reads
        updated: set[str] = set()
        later_phases, layers = [], {self.plan.cut(phase).layer}
        for before, later in pairwise(names[names.index(phase) :]):
            updated |= self.plan.divisions[before].updated
            if split == "train":
                alike = reads[later] == "cached" and phases[later].augmented_views == phases[phase].augmented_views
            else:
                alike = reads[later] != "live"
            if not alike:
                continue
            cut = self.plan.cut(later)
            if cut.layer not in layers and not updated & cut.variables.keys():
                later_phases.append(later)
                layers.add(cut.layer)
        return later_phases

    def _open(self, phase: str, split: str, memory_budget: int, beside: int = 0) -> Features | None:
        """Features of a split for a phase with the rows of earlier starts, to be completed; None: there is no room.

        `memory_budget` in bytes, negative: on disk alone. Other features of the same pass take `beside` bytes on disk.
        """
        config, runtime, options = self.config, self.config.runtime, self.config.phases[phase]
        cut, examples = self.plan.cut(phase), self.images.dataset.splits[split]
        augmented = split == "train" and config.augmentation.active
        views = (options.augmented_views or 1) if augmented else 1
        training, dtype = config.training, stored_dtype(options, cut)
        if split == "validation":
            own = examples_to_score(examples, training.batch_size, training.validation_share, self.sharding)
        else:
            own = own_examples(examples, self.sharding)
        features = Features(
            examples, cut.shape, dtype, views=views, own=own, threads=runtime.data_threads, note=log.info
        )
        if memory_budget < 0 and beside + features.bytes > runtime.disk_budget:
            return None
        images = cache_name(examples, self.classifier.image_size, config.model.resize, self.images.dataset.fingerprint)
        key = (
            _FORMAT, images, self.classifier.kind.name, cut.layer, cut.pooled and self.classifier.pooling,
            cut.fingerprint(), features.dtype, runtime.precision, features.views,
            (config.seed, config.augmentation.model_dump_json()) if augmented else None,
            rows_at_once(), runtime.deterministic, tf.__version__,
        )  # fmt: skip
        digest = hashlib.sha256("\n".join(map(str, key)).encode()).hexdigest()[:16]
        file = runtime.cache_folder / "features" / f"{split}-{digest}"
        return open_features(features, file, memory_budget, runtime.disk_budget)
