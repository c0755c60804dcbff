"""Augmented views of a report, and the thumbnails of its duplicate search."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from tests.data.splits_on_disk import open_pixels
from trainer.config.schema import Augmentation
from trainer.data.augment.apply import augment
from trainer.data.augment.mixing import mix_pairs
from trainer.evaluation.duplicates import make_thumbnails
from trainer.report import build as reporting
from trainer.types import Split

SHOWN = np.random.default_rng(0).integers(0, 256, (5, 12, 12, 3), dtype=np.uint8)
CHOSEN = np.array([3, 8, 11, 40, 41])
CHANGED = Augmentation(flip_horizontal=True, rotation=30, contrast=0.2)


def test_only_the_first_image_is_augmented_as_in_eight_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def counted(images: Any, *rest: Any) -> Any:
        counts.append(len(images))
        return augment(images, *rest)

    monkeypatch.setattr(reporting, "augment", counted)
    views = reporting.augment_views(CHANGED, 7, SHOWN, CHOSEN)
    assert counts == [8]
    for epoch in range(8):
        alone = augment(SHOWN[:1], CHANGED, 7, np.array([epoch]), CHOSEN[:1])[0]
        np.testing.assert_array_equal(views[epoch], np.clip(np.rint(alone), 0, 255))


def test_mixup_mixes_the_other_images_in_turn() -> None:
    augmentation = Augmentation(mixup=0.4)
    views = reporting.augment_views(augmentation, 7, SHOWN, CHOSEN)
    for epoch, other in enumerate([1, 2, 3, 4, 0, 1, 2, 3]):
        pair, epochs = [0, other], np.array([epoch, epoch])
        batch = {"image": SHOWN[pair].astype(np.float32), "label": np.zeros(2, np.int32),
                 "weight": np.ones(2, np.float32), "index": CHOSEN[pair]}  # fmt: skip
        image = mix_pairs(cast(Any, batch), augmentation, 7, epochs)["image"][0]
        np.testing.assert_array_equal(views[epoch], np.clip(np.rint(image), 0, 255))


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_thumbnails_are_equal_with_and_without_a_cache(tmp_path: Path, cache: Any) -> None:
    count, rng = reporting.READ_BATCH + 9, np.random.default_rng(0)
    files = [tmp_path / f"{i:03}.png" for i in range(count)]
    images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image).save(file)
    files[4].write_bytes(b"no image")
    split = Split("train", np.zeros(count, np.int32), files=tuple(map(str, files)))
    pixels = open_pixels(split, cache, tmp_path, size=32, on_error="skip")
    checks: list[int] = []
    indices = np.delete(np.arange(count), 1)
    small = reporting.read_thumbnails(pixels, indices, lambda: checks.append(1))
    good = indices != 4
    np.testing.assert_array_equal(small[good], make_thumbnails(images[indices[good]]))
    assert (list(pixels.unreadable), len(checks)) == ([4], 2)
    assert reporting.read_thumbnails(pixels, indices[:0], lambda: None).shape == (0, 16, 16, 3)
