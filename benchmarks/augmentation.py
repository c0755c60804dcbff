"""What each augmentation costs: the pipeline of a real run with it on, against the same pipeline with none.

    python -m benchmarks.augmentation --size 224

The images are the built-in digits, enlarged once and kept in memory, so that nothing is decoded. Rounds are
interleaved; the ratio of images/s is taken round by round. Processor time is that of all threads of the process, an
image, less what the pipeline takes without augmentation.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import tensorflow as tf
import yaml

from trainer.config import Augmentation, Data
from trainer.data.pipeline import training_batches
from trainer.data.pixels import memory_budget_default, open_pixels
from trainer.data.sources import open_dataset

GROUPS = Path(__file__).parent.parent / "conf" / "augmentation"
SINGLE: dict[str, dict[str, object]] = {
    "flip_horizontal": {"flip_horizontal": True},
    "crop": {"crop": 0.08},
    "crop and flip": {"crop": 0.08, "flip_horizontal": True},
    "rotation": {"rotation": 20},
    "rotation, constant": {"rotation": 20, "fill": "constant"},
    "rotation, reflect": {"rotation": 20, "fill": "reflect"},
    "every shape": {"rotation": [20, 40], "shift": 0.2, "shear": 5, "zoom": 0.2, "stretch": 0.2, "crop": 0.5},
    "brightness": {"brightness": 0.2},
    "contrast": {"contrast": 0.2},
    "saturation": {"saturation": 0.2},
    "hue": {"hue": 0.1},
    "cutout": {"cutout": 0.5},
    "randaugment 1": {"randaugment": 1},
    "randaugment 2": {"randaugment": 2},
    "mixup": {"mixup": 0.2},
    "cutmix": {"cutmix": 1.0},
    "mixup and cutmix": {"mixup": 0.2, "cutmix": 1.0},
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--size", type=int, default=224)
    arguments.add_argument("--batch", type=int, default=32)
    arguments.add_argument("--batches", type=int, default=8, help="in one round")
    arguments.add_argument("--rounds", type=int, default=5)
    options = arguments.parse_args()

    cache = Path(tempfile.mkdtemp())
    dataset = open_dataset(Data(source="digits"), seed=1, cache_dir=cache, max_examples=256, note=print)
    pixels = open_pixels(
        dataset.splits["train"],
        size=options.size,
        resize="stretch",
        cache="memory",
        cache_dir=cache,
        fingerprint=dataset.fingerprint,
        memory_budget=memory_budget_default(),
        disk_budget=0,
        threads=None,
        on_error="fail",
        note=print,
    )

    def stream(augmentation: Augmentation) -> tf.data.Dataset:
        return training_batches(
            pixels,
            batch_size=options.batch,
            replicas=1,
            seed=1,
            window=8192,
            augmentation=augmentation,
            first_epoch=0,
            first_step=0,
        )

    groups = {f"group {path.stem}": yaml.safe_load(path.read_text()) for path in sorted(GROUPS.glob("*.yaml"))}
    chosen = {name: Augmentation(**on) for name, on in {"none": {}, **SINGLE, **groups}.items()}
    speeds: dict[str, list[float]] = {name: [] for name in chosen}
    processor: dict[str, list[float]] = {name: [] for name in chosen}
    images = options.batch * options.batches
    for turn in range(options.rounds + 1):
        for name, augmentation in chosen.items():
            # Made anew each time: what the others have prefetched must not be at work while this one is measured.
            batches = iter(stream(augmentation))
            for _ in range(4):
                next(batches)
            began, used = time.perf_counter(), time.process_time()
            for _ in range(options.batches):
                next(batches)
            if turn:  # the first warms up
                speeds[name].append(images / (time.perf_counter() - began))
                processor[name].append((time.process_time() - used) / images * 1000)
            del batches
    idle = statistics.median(processor["none"])
    print(f"{'':22} {'images/s':>9} {'of none':>8} {'(min, max)':>16} {'ms of processor':>16}")
    for name, each in speeds.items():
        ratios = [a / b for a, b in zip(each, speeds["none"], strict=True)]
        spread = f"({min(ratios):.3f}, {max(ratios):.3f})"
        cost = statistics.median(processor[name]) - idle
        print(f"{name:22} {statistics.median(each):9,.0f} {statistics.median(ratios):8.3f} {spread:>16} {cost:16.2f}")


if __name__ == "__main__":
    main()
