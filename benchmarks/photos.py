"""Photos of the benchmarks: generated ones, and folders of links to given photos."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.data.image_files import EXTENSIONS


def write_photos(root: Path, count: int, classes: int = 2) -> Path:
    """Write class folders of JPEG files of 500 x 333 pixels, quality 90: noise of several sizes.

    Each class has a mean color; the colors of its photos vary around it, so that neighbouring classes overlap.
    """
    rng = np.random.default_rng(0)
    colors = rng.uniform(0, 1, (classes, 3))
    for number in range(count):
        image = np.zeros((333, 500, 3)) + 100 * (colors[number % classes] + rng.normal(0, 0.3, 3))
        for size in (4, 16, 64, 256):  # coarse and strong to fine and weak
            grain = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
            image += np.asarray(grain.resize((500, 333), Image.Resampling.BICUBIC), float) * 2 / size**0.5
        folder = root / f"class_{number % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        image -= image.min()
        Image.fromarray((image * 255 / image.max()).astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)
    return root


def photos_of(root: Path) -> dict[str, list[Path]]:
    """Class -> its photos, both sorted by name."""
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    return {f.name: sorted(p for p in f.iterdir() if p.suffix.lower() in EXTENSIONS) for f in folders}


def count_of(root: Path) -> int:
    """Number of photos in all class folders."""
    return sum(map(len, photos_of(root).values()))


def link_fold(root: Path, to: Path, fold: int, folds: int = 5) -> Path:
    """Link one of the disjoint folds of every class as `to/validation/<class>`, the others as `to/train/<class>`.

    Any trainer that reads class folders gets the same examples.
    """
    rng = np.random.default_rng(42)
    for name, photos in photos_of(root).items():
        for number, position in enumerate(rng.permutation(len(photos))):
            folder = to / ("validation" if number % folds == fold % folds else "train") / name
            folder.mkdir(parents=True, exist_ok=True)
            os.symlink(photos[position].resolve(), folder / photos[position].name)
    return to


def link_times(root: Path, to: Path, times: int) -> Path:
    """Create `to/<class>` with `times` links to each photo."""
    for name, photos in photos_of(root).items():
        (to / name).mkdir(parents=True)
        for photo in photos:
            for copy in range(times):
                os.symlink(photo.resolve(), to / name / f"{photo.stem}-{copy}{photo.suffix}")
    return to
