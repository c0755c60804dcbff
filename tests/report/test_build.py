"""What a report shows of the augmentation, and what it looks for duplicates in."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from tests.data.splits_on_disk import opened
from trainer.config.schema import Augmentation
from trainer.data.augment.apply import augment
from trainer.data.augment.mixing import mixed
from trainer.evaluation.duplicates import shrink
from trainer.report import build as reporting
from trainer.types import Split

SHOWN = np.random.default_rng(0).integers(0, 256, (5, 12, 12, 3), dtype=np.uint8)
CHOSEN = np.array([3, 8, 11, 40, 41])
CHANGED = Augmentation(flip_horizontal=True, rotation=30, contrast=0.2)


def views_of(augmentation: Augmentation) -> np.ndarray:
    return reporting.views(augmentation, 7, SHOWN, CHOSEN)


def test_the_first_picture_is_shown_as_eight_epochs_see_it_and_no_other_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts: list[int] = []

    def counted(images: Any, *rest: Any) -> Any:
        counts.append(len(images))
        return augment(images, *rest)

    monkeypatch.setattr(reporting, "augment", counted)
    seen = views_of(CHANGED)
    assert counts == [8]
    for epoch in range(8):
        alone = augment(SHOWN[:1], CHANGED, 7, np.array([epoch]), CHOSEN[:1])[0]
        np.testing.assert_array_equal(seen[epoch], np.clip(np.rint(alone), 0, 255))


def test_what_is_mixed_is_shown_with_the_other_pictures_in_turn() -> None:
    augmentation = Augmentation(mixup=0.4)
    seen = views_of(augmentation)
    for epoch, other in enumerate([1, 2, 3, 4, 0, 1, 2, 3]):
        pair, epochs = [0, other], np.array([epoch, epoch])
        batch = {"image": SHOWN[pair].astype(np.float32), "label": np.zeros(2, np.int32),
                 "weight": np.ones(2, np.float32), "index": CHOSEN[pair]}  # fmt: skip
        image = mixed(cast(Any, batch), augmentation, 7, epochs)["image"][0]
        np.testing.assert_array_equal(seen[epoch], np.clip(np.rint(image), 0, 255))


@pytest.mark.parametrize("kept", ["memory", "none"])
def test_pictures_are_made_small_whether_they_are_kept_or_decoded_anew(tmp_path: Path, kept: Any) -> None:
    count, rng = reporting.READ_AT_ONCE + 9, np.random.default_rng(0)
    files = [tmp_path / f"{i:03}.png" for i in range(count)]
    images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image).save(file)
    files[4].write_bytes(b"no picture")
    split = Split("train", np.zeros(count, np.int32), files=tuple(map(str, files)))
    pixels = opened(split, kept, tmp_path, size=32, on_error="skip")
    checks: list[int] = []
    wanted = np.delete(np.arange(count), 1)
    small = reporting.small_pictures(pixels, wanted, lambda: checks.append(1))
    good = wanted != 4
    np.testing.assert_array_equal(small[good], shrink(images[wanted[good]]))
    assert (list(pixels.bad), len(checks)) == ([4], 2)
    assert reporting.small_pictures(pixels, wanted[:0], lambda: None).shape == (0, 16, 16, 3)
