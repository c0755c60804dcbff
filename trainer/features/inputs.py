"""Open the inputs of a phase: images, or cached features, which are the outputs of the frozen layers (the trunk)."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import tensorflow as tf

from trainer.cluster.worker import Worker
from trainer.config.schema import Augmentation
from trainer.data.images import BatchSource, ImageStore, build_cache_name
from trainer.data.order import select_examples_to_score
from trainer.data.sharding import select_worker_examples
from trainer.evaluation.scoring import Scorer, get_images_per_call
from trainer.features.compute import FeaturePass, FeatureRequest
from trainer.features.cut import Tail
from trainer.features.litert import LiteRTClassifier
from trainer.features.plan import FeaturePlan, select_stored_dtype
from trainer.features.store import Features, open_features
from trainer.models.classifier import Classifier
from trainer.monitoring.log import log
from trainer.storage.disk import choose_disk_budget
from trainer.training.step import Network

_FORMAT = 2  # version of the features on disk, part of their file name; increment it when their values change


@dataclass(frozen=True)
class Inputs:
    """The inputs of a phase, and the network that it trains: the classifier on images, or its tail on features."""

    network: Network
    scorer: Scorer  # scores `validation`
    training: BatchSource
    validation: BatchSource
    augmentation: Augmentation  # for batches of `training`; inactive for features, which come from augmented images
    views: int | None  # augmented views per example, one per epoch in turn; None to draw a new view in each epoch


def open_inputs(
    name: str, worker: Worker, images: ImageStore, classifier: Classifier, plan: FeaturePlan, scorer: Scorer
) -> Inputs | None:
    """Open the inputs of a phase. If it reads cached features, all workers compute the missing ones together.

    Args:
        name: name of the phase, whose layers of `classifier` must already be frozen and unfrozen.
        plan: plan that determines the input of each phase.
        scorer: scorer of the complete classifier.

    Returns:
        The inputs. None on all workers if the run should stop, or if a worker cannot store the features.

    Raises:
        DataError: an image cannot be read, or a feature is too large for float16.
    """
    augmentation = images.config.augmentation
    input_kind = plan.input_kinds[name]
    engine = plan.engines[name]
    views = images.config.phases[name].augmented_views if augmentation.active else None
    feature_pass = FeaturePass(worker, images, classifier, engine)
    network: Network = classifier
    if input_kind != "cached" and engine == "litert":
        network = LiteRTClassifier(classifier, plan.cut(name), feature_pass.convert_trunk([plan.cut(name)]))

    def make_scorer(scored: Network) -> Scorer:
        return Scorer(worker, scored, scorer.sharding, on_wait=scorer.on_wait, rows_per_call=scorer.rows_per_call)

    if input_kind == "live":
        live_scorer = scorer if network is classifier else make_scorer(network)
        return Inputs(
            network, live_scorer, images.open_split("train"), images.open_split("validation"), augmentation, views
        )
    cache = FeatureCache(feature_pass, plan, scorer)
    features = cache.open(name, ("train", "validation") if input_kind == "cached" else ("validation",))
    if features is None:
        return None
    tail = Tail(classifier, plan.cut(name))
    if input_kind == "cached":
        train_features, validation_features = features
        return Inputs(tail, make_scorer(tail), train_features, validation_features, Augmentation(), None)
    (validation_features,) = features  # the kind is "validation": training on images, validation on features
    return Inputs(network, make_scorer(tail), images.open_split("train"), validation_features, augmentation, views)


def switch_to_images(name: str, images: ImageStore, plan: FeaturePlan) -> None:
    """Change the plan so that a phase reads images, because there is no space for its features."""
    if plan.input_kinds[name] == "cached":
        images.release_split("train")  # it has no cache, because it was to be read once; it is opened again with one
    plan.input_kinds[name] = "live"
    images.train_images_read_once = False


@dataclass(frozen=True)
class FeatureCache:
    """Opens the features of a phase: reads the rows that an earlier process stored on disk, and computes the others."""

    feature_pass: FeaturePass
    plan: FeaturePlan
    scorer: Scorer

    @property
    def images(self) -> ImageStore:
        """The images of the run."""
        return self.feature_pass.images

    def open(self, phase: str, splits: Sequence[str]) -> list[Features] | None:
        """Return a phase's complete features, in the order of `splits`. All workers call this together.

        Features of later phases whose trunks do not change until then are computed in the same pass over the images,
        if they fit on disk.

        Returns:
            The features. None on all workers if the run should stop, or if a worker cannot store the features.

        Raises:
            DataError: an image cannot be read, or a feature is too large for float16.
        """
        feature_pass, worker = self.feature_pass, self.feature_pass.worker
        control = worker.control
        opened_features: list[Features] = []
        for split in splits:
            memory_used = sum(features.num_bytes for features in opened_features if features.cached_in == "memory")
            features = self._open(phase, split, self.images.memory_left - memory_used)
            if control.any_worker("no space for features", features is None) or features is None:
                return None
            requests = [FeatureRequest(self.plan.cut(phase), features, required=True)]
            for later_phase in self._later_phases_in_same_pass(phase, split):
                # On disk only, because it is not yet known how much memory will be free in that phase.
                later = self._open(later_phase, split, None, disk_used=sum(r.features.num_bytes for r in requests))
                if not control.any_worker("no space for later features", later is None) and later is not None:
                    requests.append(FeatureRequest(self.plan.cut(later_phase), later, required=False))
            # If all workers read the same features, each computes a shard, and they exchange them.
            exchange = split == "train" and self.scorer.sharding.mode == "record" and worker.size > 1
            augmentation = self.images.config.augmentation if split == "train" else Augmentation()
            is_complete = feature_pass.compute_missing(requests, augmentation, exchange)
            if control.any_worker("features not done", not is_complete or requests[0].failed):
                return None
            features.finish_writing()
            if features.unreadable:
                self.images.open_split(split).known_unreadable |= features.unreadable
            opened_features.append(features)
        return opened_features

    def _later_phases_in_same_pass(self, phase: str, split: str) -> list[str]:
        """Return the later phases whose features can be computed in the pass for `phase`.

        Such a phase reads the same views of the split, but at a different cut, and computes the trunk with the same
        engine. Neither `phase` nor any phase between the two updates the later phase's trunk.
        """
        names = list(self.images.config.phases)
        phases = self.images.config.phases
        kinds = self.plan.input_kinds
        updated_variables: set[str] = set()
        later_phases = []
        cut_layers = {self.plan.cut(phase).layer}
        for previous, later in pairwise(names[names.index(phase) :]):
            updated_variables |= self.plan.divisions[previous].updated
            if split == "train":
                same_views = kinds[later] == "cached" and phases[later].augmented_views == phases[phase].augmented_views
            else:
                same_views = kinds[later] != "live"
            if not same_views or self.plan.engines[later] != self.plan.engines[phase]:
                continue
            cut = self.plan.cut(later)
            if cut.layer not in cut_layers and not updated_variables & cut.variables.keys():
                later_phases.append(later)
                cut_layers.add(cut.layer)
        return later_phases

    def _open(self, phase: str, split: str, memory_budget: int | None, disk_used: int = 0) -> Features | None:
        """Open the features of a split for a phase. Return None if there is no space for them.

        Args:
            memory_budget: maximum size in memory, in bytes; None to store the features only on disk.
            disk_used: bytes of the disk budget that other features of the same pass use.
        """
        config, runtime, options = self.images.config, self.images.config.runtime, self.images.config.phases[phase]
        cut = self.plan.cut(phase)
        examples = self.images.dataset.splits[split]
        training = config.training
        is_augmented = split == "train" and config.augmentation.active
        views = (options.augmented_views or 1) if is_augmented else 1
        if split == "validation":
            fraction = training.validation_share
            scorer = self.scorer
            indices = select_examples_to_score(
                examples, training.batch_size, fraction, scorer.sharding, scorer.rows_per_call
            )
        else:
            indices = select_worker_examples(examples, self.scorer.sharding)
        dtype = select_stored_dtype(options, cut)
        threads = runtime.data_threads
        features = Features(examples, cut.shape, dtype, views, indices, threads, log.info)
        disk_budget, _ = choose_disk_budget(runtime.disk_budget, runtime.cache_folder)
        if memory_budget is None and disk_used + features.num_bytes > disk_budget:
            return None
        classifier, fingerprint = self.feature_pass.classifier, self.images.dataset.fingerprint
        decoded_name = build_cache_name(examples, classifier.image_size, config.model.resize, fingerprint)
        key = (
            _FORMAT, decoded_name, classifier.spec.name, cut.layer, cut.pooled and classifier.pooling,
            cut.compute_fingerprint(), features.dtype, runtime.precision, features.views,
            (config.seed, config.augmentation.model_dump_json()) if is_augmented else None,
            get_images_per_call(), runtime.deterministic, tf.__version__, self.feature_pass.engine,
        )  # fmt: skip
        digest = hashlib.sha256("\n".join(map(str, key)).encode()).hexdigest()[:16]
        file = runtime.cache_folder / "features" / f"{split}-{digest}"
        return open_features(features, file, memory_budget, disk_budget)
