"""The pass that computes features of frozen layers, against nothing but those layers over the same images in memory.

python -m benchmarks.feature_pass --data FOLDER --weights FILE --alpha 0.35
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

from benchmarks.asking import arguments_of, command_of, data_in_words, folder_for, model_in_words, photos
from benchmarks.results import Comparison, Result, keep
from trainer.cli.compose import compose
from trainer.cluster.control import ControlChannel
from trainer.cluster.discovery import discover
from trainer.cluster.signals import StopFlag
from trainer.config.schema import Augmentation, load
from trainer.data.host import usable_cpus
from trainer.features.compute import FeaturePass, Wanted, rows_at_once
from trainer.features.cut import Cut, Trunk
from trainer.features.plan import divisions
from trainer.features.store import open_features
from trainer.run import GIGABYTE, Run
from trainer.runs.folder import open_run_folder
from trainer.start import open_run

PHASES = {"head": "the whole backbone, pooled", "fine_tune": "up to layer 97 (thawed from 100)"}
HOW = """One process; the training images are decoded and in memory on both sides. Ours is the pass of a run: it reads
them in order, computes, and keeps the features in memory and in a file with checksums. Bare is one compiled function
over the same images, {rows} at once as ours, whose answers are dropped. Each was traced before. {data}; {model}."""


def open_job(root: Path, asked: argparse.Namespace, scratch: Path) -> Run:
    """A run of the recipe as it stands before its first phase."""
    tree = compose([
        "experiment=flowers_mobilenet_v2", "data=image_folder", f"data.root={root}", "data.cache=memory",
        "augmentation=none", f"model.weights={asked.weights}", f"model.alpha={asked.alpha}",
        f"output_dir={scratch / 'run'}", f"runtime.cache_dir={scratch / 'cache'}",
    ])  # fmt: skip
    assert tree is not None
    config = load(tree)
    return open_run(config, open_run_folder(config, 1), ControlChannel(discover(os.environ), {}), StopFlag(), time.time())


def our_pass(job: Run, cut: Cut, scratch: Path) -> Callable[[], float]:
    """Each call computes all features anew: images/s."""
    compute, split = FeaturePass(job), job.dataset.splits["train"]

    def once() -> float:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            features = open_features(
                split, shape=cut.shape, dtype="float32", views=1, own=np.arange(split.count), file=Path(folder) / "f",
                memory_budget=4 * GIGABYTE, disk_budget=4 * GIGABYTE, threads=usable_cpus(), note=lambda _: None,
            )  # fmt: skip
            assert features is not None
            began = time.perf_counter()
            assert compute.fill([Wanted(cut, features, needed=True)], Augmentation(), exchanged=False)
            features.complete()
            return split.count / (time.perf_counter() - began)

    return once


def bare_pass(job: Run, cut: Cut) -> Callable[[], float]:
    """Each call runs the layers below the cut over the same images: images/s."""
    rows, images = rows_at_once(), job.pixels("train").tensor()
    count = job.dataset.splits["train"].count
    batches = [images[start : start + rows] for start in range(0, count, rows)]
    trunk = Trunk(job.classifier, [cut])
    forward = tf.function(trunk.features)

    def once() -> float:
        began = time.perf_counter()
        for batch in batches:
            (made,) = forward(batch)
        made.numpy()
        return count / (time.perf_counter() - began)

    return once


def measure(asked: argparse.Namespace) -> Result:
    rounds, comparisons = asked.rounds or 7, []
    with photos(asked) as root, tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        job = open_job(root, asked, scratch)
        parts = divisions(job.config, job.classifier)
        for phase, words in PHASES.items():
            cut = parts[phase].cut
            assert cut is not None
            sides = {"ours": our_pass(job, cut, scratch), "bare": bare_pass(job, cut)}
            speeds: dict[str, list[float]] = {side: [] for side in sides}
            for turn in range(rounds + 1):
                for side, once in sides.items():
                    speed = once()
                    if turn:  # the first traces
                        speeds[side].append(speed)
            comparisons.append(Comparison(words, "bare inference", "images/s", speeds["ours"], speeds["bare"]))
        named = {"data": data_in_words(asked, root), "model": model_in_words(asked), "rows": str(rows_at_once())}
    return Result(
        name=f"features-alpha-{asked.alpha:g}",
        title=f"Feature pass, MobileNetV2 of width {asked.alpha:g}",
        how=HOW.replace("\n", " ").format(**named),
        command=command_of("features", asked, rounds),
        comparisons=comparisons,
    )


def main() -> None:
    asked = arguments_of(__doc__).parse_args()
    keep(measure(asked), folder_for(asked))


if __name__ == "__main__":
    main()
