"""Measure the cost of each augmentation: the input pipeline of a run with it, compared with the one without.

    python -m benchmarks.augmentation --size 224

Generated photos of 500 x 333 pixels are decoded and resized in every epoch. Rounds are interleaved, and the ratio of
images/s is computed per round. Processor time is the CPU time of all threads of the process per image: in the row
`none` the time of decoding and resizing, in the other rows the difference to it.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import yaml

from benchmarks.arguments import select_all_for_training
from benchmarks.photos import write_photos
from benchmarks.pipelines import build_training_stream, open_training_images
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
    """Measure all augmentations in interleaved rounds, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=8, help="in one round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    _, pixels = open_training_images(
        select_all_for_training(write_photos(Path(tempfile.mkdtemp()), 96)), options.size, "none"
    )

    groups = {f"group {path.stem}": yaml.safe_load(path.read_text()) for path in sorted(GROUPS.glob("[!n]*.yaml"))}
    chosen = {name: Augmentation(**keywords) for name, keywords in {"none": {}, **SINGLE, **groups}.items()}
    speeds: dict[str, list[float]] = {name: [] for name in chosen}
    processor: dict[str, list[float]] = {name: [] for name in chosen}
    images = options.batch * options.batches
    for round_index in range(options.rounds + 1):
        for name, augmentation in chosen.items():
            # A new pipeline each time, so that no other one prefetches during the measurement.
            batches = iter(build_training_stream(pixels, options.batch, augmentation))
            for _ in range(6):
                next(batches)
            started_at, processor_start = time.perf_counter(), time.process_time()
            for _ in range(options.batches):
                next(batches)
            if round_index:  # the first round is for warm-up
                speeds[name].append(images / (time.perf_counter() - started_at))
                processor[name].append((time.process_time() - processor_start) / images * 1000)
            del batches
    decoding = statistics.median(processor["none"])
    print(f"{'':22} {'images/s':>9} {'of none':>8} {'(min, max)':>16} {'ms of processor':>16}")
    for name, values in speeds.items():
        ratios = [a / b for a, b in zip(values, speeds["none"], strict=True)]
        ranges = f"({min(ratios):.2f}, {max(ratios):.2f})"
        cost = statistics.median(processor[name]) - (0 if name == "none" else decoding)
        print(f"{name:22} {statistics.median(values):9,.0f} {statistics.median(ratios):8.2f} {ranges:>16} {cost:16.2f}")


if __name__ == "__main__":
    main()
