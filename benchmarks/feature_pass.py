"""Compare the feature pass of a run with the frozen layers alone, on the same images in memory.

python -m benchmarks.feature_pass --data FOLDER --weights FILE --alpha 0.35
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

from benchmarks.arguments import (
    choose_output_folder,
    describe_data,
    describe_model,
    format_command,
    make_argument_parser,
    open_photos,
)
from benchmarks.results import Comparison, Result, save_result
from trainer.cli.compose import compose
from trainer.cluster.control import ControlChannel
from trainer.cluster.devices import build_strategy
from trainer.cluster.discovery import discover
from trainer.cluster.signals import StopFlag
from trainer.cluster.worker import Worker
from trainer.config.schema import GIGABYTE, Augmentation, validate_config
from trainer.data.host import count_usable_cpus
from trainer.data.images import ImageStore
from trainer.data.open import stage_and_open_run_dataset
from trainer.evaluation.scoring import get_images_per_call
from trainer.features.compute import FeaturePass, FeatureRequest
from trainer.features.cut import Cut, Trunk
from trainer.features.plan import TrunkEngine, divide_phases
from trainer.features.store import Features, open_features
from trainer.models.classifier import Classifier, build_classifier

ENGINES: dict[TrunkEngine, str] = {"tensorflow": "TensorFlow", "litert": "LiteRT"}
PHASES = {"head": "the whole backbone, pooled", "fine_tune": "up to layer 97 (thawed from 100)"}
HOW = """One process; the training images are decoded and in memory on both sides. Ours is the pass of a run: it reads
them in order, computes, and stores the features in memory and in a file with checksums. Bare is one compiled function
of TensorFlow over the same images, {rows} at once as ours, whose outputs are discarded. Both were traced before.
{data}; {model}."""


def open_recipe(root: Path, options: argparse.Namespace, scratch: Path) -> tuple[Worker, ImageStore, Classifier]:
    """Open the devices, images and classifier of the flowers recipe as a run does."""
    tree = compose([
        "experiment=flowers_mobilenet_v2", "data=image_folder", f"data.root={root}", "data.cache=memory",
        "augmentation=none", f"model.weights={options.weights}", f"model.alpha={options.alpha}",
        f"output_dir={scratch / 'run'}", f"runtime.cache_dir={scratch / 'cache'}",
    ])  # fmt: skip
    assert tree is not None
    config = validate_config(tree)
    data, control = stage_and_open_run_dataset(config, print, lambda _: None), ControlChannel(discover(os.environ), {})
    worker = Worker(control, build_strategy(config, control, print, count_usable_cpus()), StopFlag())
    classifier = build_classifier(config.model, len(data.dataset.class_names), config.seed)
    return worker, ImageStore(data, config, classifier.image_size, lambda _: None), classifier


def make_our_pass(
    worker: Worker, images: ImageStore, classifier: Classifier, cut: Cut, scratch: Path, engine: TrunkEngine
) -> Callable[[], float]:
    """Make a function that computes and stores all features with one library as a run does, and returns images/s."""
    compute, split = FeaturePass(worker, images, classifier, engine), images.dataset.splits["train"]

    def run_pass() -> float:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            unfilled = Features(split, cut.shape, "float32", 1, np.arange(split.count))
            features = open_features(unfilled, Path(folder) / "f", 4 * GIGABYTE, 4 * GIGABYTE)
            assert features is not None
            started_at = time.perf_counter()
            assert compute.compute_missing(
                [FeatureRequest(cut, features, required=True)], Augmentation(), exchange=False
            )
            features.finish_writing()
            return split.count / (time.perf_counter() - started_at)

    return run_pass


def make_bare_pass(images: ImageStore, classifier: Classifier, cut: Cut) -> Callable[[], float]:
    """Make a function that runs the layers below the cut on the same images, and returns images/s."""
    rows, pixels = get_images_per_call(), images.open_split("train").tensor()
    count = images.dataset.splits["train"].count
    batches = [pixels[start : start + rows] for start in range(0, count, rows)]
    trunk = Trunk(classifier, [cut])
    forward = tf.function(trunk.features)

    def run_pass() -> float:
        started_at = time.perf_counter()
        for batch in batches:
            (features,) = forward(batch)
        features.numpy()
        return count / (time.perf_counter() - started_at)

    return run_pass


def measure(options: argparse.Namespace) -> Result:
    """Measure the feature passes of both phases in interleaved rounds."""
    rounds, comparisons = options.rounds or 7, []
    with open_photos(options) as root, tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        worker, images, classifier = open_recipe(root, options, scratch)
        divisions = divide_phases(images.config, classifier)
        for phase, layers in PHASES.items():
            cut = divisions[phase].cut
            assert cut is not None
            sides: dict[str, Callable[[], float]] = {
                name: make_our_pass(worker, images, classifier, cut, scratch, name) for name in ENGINES
            }
            sides["bare"] = make_bare_pass(images, classifier, cut)
            speeds: dict[str, list[float]] = {side: [] for side in sides}
            for round_index in range(rounds + 1):
                for side, run_pass in sides.items():
                    speed = run_pass()
                    if round_index:  # the first round traces
                        speeds[side].append(speed)
            for name, library in ENGINES.items():
                row = f"{layers}, by {library}"
                comparisons.append(Comparison(row, "bare inference", "images/s", speeds[name], speeds["bare"]))
        values = {
            "data": describe_data(options, root),
            "model": describe_model(options),
            "rows": str(get_images_per_call()),
        }
    return Result(
        name=f"features-alpha-{options.alpha:g}",
        title=f"Feature pass, MobileNetV2 of width {options.alpha:g}",
        how=HOW.replace("\n", " ").format(**values),
        command=format_command("features", options, rounds),
        comparisons=comparisons,
    )


def main() -> None:
    """Measure the feature pass, and save the result."""
    options = make_argument_parser(__doc__).parse_args()
    save_result(measure(options), choose_output_folder(options))


if __name__ == "__main__":
    main()
