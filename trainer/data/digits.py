"""Prepare the built-in dataset: scikit-learn's 1,797 images of handwritten digits, with 8 x 8 pixels each."""

import io
import os
import shutil
import uuid
from pathlib import Path

import numpy as np

from trainer.data.tfds_folder import INFO_FILE
from trainer.data.tfds_writer import LabeledImages, WriteOptions, write_dataset

TEST_EXAMPLES, VALIDATION_EXAMPLES, SPLIT_SEED = 360, 180, 42  # the other 1,257 examples are for training


def prepare_digits(cache_dir: Path) -> Path:
    """Return the folder `cache_dir`/digits, which has the digits in the format of TFDS. The first call writes it.

    The images are 8-bit grayscale PNGs, white on black, with values scaled from 0..16 to 0..255. The division into
    1,257 training, 180 validation and 360 test examples is fixed and stratified by class. Source: the test set of
    Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998), UCI Machine Learning Repository.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = cache_dir / "digits"
    if (folder / INFO_FILE).exists():
        return folder
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    # Two runs can write the folder concurrently. Only the first rename succeeds.
    temporary_folder = cache_dir / f".digits-{uuid.uuid4().hex}"
    temporary_folder.mkdir(parents=True)
    digits = load_digits()
    images = []
    for pixels in digits.images:
        png = io.BytesIO()
        Image.fromarray(np.round(pixels * 255 / 16).astype(np.uint8)).save(png, "PNG")
        images.append(png.getvalue())

    def split_off(indices: np.ndarray, count: int) -> list[np.ndarray]:
        return train_test_split(indices, test_size=count, stratify=digits.target[indices], random_state=SPLIT_SEED)

    train_and_validation, test = split_off(np.arange(len(images)), TEST_EXAMPLES)
    train, validation = split_off(train_and_validation, VALIDATION_EXAMPLES)
    indices = {"train": train, "validation": validation, "test": test}
    splits = {name: [(images[i], int(digits.target[i])) for i in members] for name, members in indices.items()}
    write_dataset(temporary_folder, LabeledImages("digits", tuple("0123456789"), splits), WriteOptions(verify=False))
    try:
        os.rename(temporary_folder, folder)
    except OSError:
        shutil.rmtree(temporary_folder)
        if not (folder / INFO_FILE).exists():
            raise
    return folder
