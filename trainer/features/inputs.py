"""Inputs of a phase: images, or cached features of its frozen layers."""

from dataclasses import dataclass

from trainer.cluster.worker import Worker
from trainer.config.schema import Augmentation
from trainer.data.images import BatchSource, ImageStore
from trainer.evaluation.scoring import Scorer
from trainer.features.cache import FeatureCache
from trainer.features.cut import Tail
from trainer.features.plan import FeaturePlan
from trainer.models.classifier import Classifier
from trainer.training.step import Network


@dataclass(frozen=True)
class Inputs:
    """Sources of a phase, and the network that it trains on them: the classifier, or its tail on cached features."""

    network: Network
    scorer: Scorer
    training: BatchSource
    validation: BatchSource
    augmentation: Augmentation  # still to be applied to `training`
    views: int | None  # augmentations of each example; None: another one in each epoch


def open_inputs(
    name: str, worker: Worker, images: ImageStore, classifier: Classifier, plan: FeaturePlan, scorer: Scorer
) -> Inputs | None:
    """Open the inputs of a phase after `apply_thaw`; may compute features, on all workers.

    `scorer` is that of the whole classifier. None where a worker has no room for features, or was asked to stop.

    Raises:
        DataError: an image cannot be read.
    """
    augmentation, reads = images.config.augmentation, plan.reads[name]
    views = images.config.phases[name].augmented_views if augmentation.active else None
    if reads == "live":
        return Inputs(classifier, scorer, images.split("train"), images.split("validation"), augmentation, views)
    cache = FeatureCache(worker, images, classifier, plan, scorer.sharding)
    features = cache.open(name, ("train", "validation") if reads == "cached" else ("validation",))
    if features is None:
        return None
    tail = Tail(classifier, plan.cut(name))
    tail_scorer = Scorer(worker, tail, scorer.sharding, scorer.waited)
    if reads == "cached":
        return Inputs(tail, tail_scorer, features[0], features[1], Augmentation(), None)
    return Inputs(classifier, tail_scorer, images.split("train"), features[0], augmentation, views)


def go_live(name: str, images: ImageStore, plan: FeaturePlan) -> None:
    """Make a phase without room for features read images."""
    if plan.reads[name] == "cached":
        images.forget("train")
    plan.reads[name] = "live"
    images.train_once = False
