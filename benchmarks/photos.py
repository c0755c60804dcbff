"""Photos for the benchmarks: generate them, list them, and make folders of links to them."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.data.image_files import EXTENSIONS


def write_photos(root: Path, count: int, classes: int = 2) -> Path:
    """Write `count` JPEG files of 500 x 333 pixels and quality 90 to folders of `classes` classes, and return `root`.

    The photos are noise at several scales. Each class has a mean color, around which the colors of its photos vary, so
    that similar classes overlap.
    """
    rng = np.random.default_rng(0)
    colors = rng.uniform(0, 1, (classes, 3))
    for number in range(count):
        image = np.zeros((333, 500, 3)) + 100 * (colors[number % classes] + rng.normal(0, 0.3, 3))
        for size in (4, 16, 64, 256):  # from coarse, strong noise to fine, weak noise
            grain = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
            image += np.asarray(grain.resize((500, 333), Image.Resampling.BICUBIC), float) * 2 / size**0.5
        folder = root / f"class_{number % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        image -= image.min()
        Image.fromarray((image * 255 / image.max()).astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)
    return root


def list_photos(root: Path) -> dict[str, list[Path]]:
    """List the photos of each class. Classes and photos are sorted by name."""
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    return {f.name: sorted(p for p in f.iterdir() if p.suffix.lower() in EXTENSIONS) for f in folders}


def count_photos(root: Path) -> int:
    """Count the photos in all class folders."""
    return sum(map(len, list_photos(root).values()))


def link_fold(root: Path, to: Path, fold: int, folds: int = 5) -> Path:
    """Link one of `folds` disjoint folds to `to/validation/<class>`, and the others to `to/train/<class>`; return `to`.

    All programs that read class folders then get the same examples.
    """
    rng = np.random.default_rng(42)
    for name, photos in list_photos(root).items():
        for number, position in enumerate(rng.permutation(len(photos))):
            folder = to / ("validation" if number % folds == fold % folds else "train") / name
            folder.mkdir(parents=True, exist_ok=True)
            os.symlink(photos[position].resolve(), folder / photos[position].name)
    return to


def link_repeatedly(root: Path, to: Path, copies: int) -> Path:
    """Create `to/<class>` with `copies` links to each photo, and return `to`."""
    for name, photos in list_photos(root).items():
        (to / name).mkdir(parents=True)
        for photo in photos:
            for copy in range(copies):
                os.symlink(photo.resolve(), to / name / f"{photo.stem}-{copy}{photo.suffix}")
    return to
