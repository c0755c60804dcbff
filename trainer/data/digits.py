"""The embedded dataset: 1,797 real handwritten digits, 8x8 pixels, from scikit-learn."""

import io
import os
import shutil
import uuid
from pathlib import Path

import numpy as np

from trainer.data.tfds_folder import INFO
from trainer.data.tfds_writer import LabelledImages, WriteOptions, write_dataset

TEST, VALIDATION, SPLIT_SEED = 360, 180, 42  # the rest, 1,257, trains


def digits_folder(cache_dir: Path) -> Path:
    """Write the digits as a TFDS folder below the cache folder, once, and return that folder.

    White ink on black, 0..16 stretched to 0..255, 8-bit grayscale PNG; a fixed split, stratified by class, into
    1,257 / 180 / 360. Source: UCI optical recognition of handwritten digits, Alpaydin and Kaynak, 1998 (test part).

    Raises:
        OSError: the folder cannot be written.
    """
    folder = cache_dir / "digits"
    if (folder / INFO).exists():
        return folder
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    temporary = cache_dir / f".digits-{uuid.uuid4().hex}"  # two runs may start at once: the first rename counts
    temporary.mkdir(parents=True)
    digits, images = load_digits(), []
    for pixels in digits.images:
        out = io.BytesIO()
        Image.fromarray(np.round(pixels * 255 / 16).astype(np.uint8)).save(out, "PNG")
        images.append(out.getvalue())

    def split_off(indices: np.ndarray, count: int) -> list[np.ndarray]:
        return train_test_split(indices, test_size=count, stratify=digits.target[indices], random_state=SPLIT_SEED)

    rest, test = split_off(np.arange(len(images)), TEST)
    train, validation = split_off(rest, VALIDATION)
    indices = {"train": train, "validation": validation, "test": test}
    splits = {name: [(images[i], int(digits.target[i])) for i in chosen] for name, chosen in indices.items()}
    write_dataset(temporary, LabelledImages("digits", tuple("0123456789"), splits), WriteOptions(verify=False))
    try:
        os.rename(temporary, folder)
    except OSError:
        shutil.rmtree(temporary)
        if not (folder / INFO).exists():
            raise
    return folder
