"""What each augmentation costs: the pipeline of a real run with it on, against the same pipeline with none.

    python -m benchmarks.augmentation --size 224

Photos of 500 x 333 pixels (noise of several sizes, JPEG quality 90) are decoded and resized whenever they are read.
Rounds are interleaved; the ratio of images/s is taken round by round. Processor time is that of all threads of the
process for an image; of none, decoding and all; of the others, what they add to that.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import yaml

from benchmarks.asking import all_to_train
from benchmarks.photos import write_photos
from benchmarks.pipelines import open_training, stream
from trainer.config.schema import Augmentation

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

    _, pixels = open_training(all_to_train(write_photos(Path(tempfile.mkdtemp()), 96)), options.size, "none")

    groups = {f"group {path.stem}": yaml.safe_load(path.read_text()) for path in sorted(GROUPS.glob("[!n]*.yaml"))}
    chosen = {name: Augmentation(**on) for name, on in {"none": {}, **SINGLE, **groups}.items()}
    speeds: dict[str, list[float]] = {name: [] for name in chosen}
    processor: dict[str, list[float]] = {name: [] for name in chosen}
    images = options.batch * options.batches
    for turn in range(options.rounds + 1):
        for name, augmentation in chosen.items():
            # Made anew each time: what the others have prefetched must not be at work while this one is measured.
            batches = iter(stream(pixels, options.batch, augmentation))
            for _ in range(6):
                next(batches)
            began, used = time.perf_counter(), time.process_time()
            for _ in range(options.batches):
                next(batches)
            if turn:  # the first warms up
                speeds[name].append(images / (time.perf_counter() - began))
                processor[name].append((time.process_time() - used) / images * 1000)
            del batches
    decoding = statistics.median(processor["none"])
    print(f"{'':22} {'images/s':>9} {'of none':>8} {'(min, max)':>16} {'ms of processor':>16}")
    for name, each in speeds.items():
        ratios = [a / b for a, b in zip(each, speeds["none"], strict=True)]
        spread = f"({min(ratios):.2f}, {max(ratios):.2f})"
        cost = statistics.median(processor[name]) - (0 if name == "none" else decoding)
        print(f"{name:22} {statistics.median(each):9,.0f} {statistics.median(ratios):8.2f} {spread:>16} {cost:16.2f}")


if __name__ == "__main__":
    main()
