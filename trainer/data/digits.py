"""The embedded data set: 1,797 real handwritten digits, 8x8 pixels, shipped inside scikit-learn."""

import io
import os
import shutil
import uuid
from pathlib import Path

import numpy as np

from trainer.data.tfds_writer import LabelledImages, WriteOptions, write_dataset

TEST, VALIDATION, SPLIT_SEED = 360, 180, 42  # the rest, 1,257, trains


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def digits_folder(cache_dir: Path) -> Path:
    """Write the digits as a TFDS folder below the cache folder, unless they are there. Returns that folder.

    White ink on black, 0..16 stretched to 0..255, 8-bit grayscale PNG; a fixed split, stratified by class, into
    1,257 / 180 / 360. Source: UCI optical recognition of handwritten digits, Alpaydin and Kaynak, 1998 (test part).
    """
    folder = cache_dir / "digits"
    if (folder / "dataset_info.json").exists():
        return folder
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images, labels = [_png(np.round(image * 255 / 16).astype(np.uint8)) for image in digits.images], digits.target

    def split_off(indices: np.ndarray, count: int) -> list[np.ndarray]:
        return train_test_split(indices, test_size=count, stratify=labels[indices], random_state=SPLIT_SEED)

    rest, test = split_off(np.arange(len(labels)), TEST)
    train, validation = split_off(rest, VALIDATION)
    parts = {"train": train, "validation": validation, "test": test}
    temporary = cache_dir / f".digits-{uuid.uuid4().hex}"  # two runs may start at once: the first rename wins
    splits = {name: [(images[i], int(labels[i])) for i in indices] for name, indices in parts.items()}
    write_dataset(temporary, LabelledImages("digits", tuple("0123456789"), splits), WriteOptions(verify=False))
    try:
        os.rename(temporary, folder)
    except OSError:
        shutil.rmtree(temporary)
        if not (folder / "dataset_info.json").exists():
            raise
    return folder
