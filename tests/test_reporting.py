"""What a report shows of the augmentation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from trainer import reporting
from trainer.config import Augmentation
from trainer.data.augment import augment
from trainer.data.mixing import mixed

SHOWN = np.random.default_rng(0).integers(0, 256, (5, 12, 12, 3), dtype=np.uint8)
CHOSEN = np.array([3, 8, 11, 40, 41])
CHANGED = Augmentation(flip_horizontal=True, rotation=30, contrast=0.2)


def views_of(augmentation: Augmentation) -> np.ndarray:
    job = SimpleNamespace(config=SimpleNamespace(seed=7, augmentation=augmentation))
    return reporting.views(cast(Any, job), SHOWN, CHOSEN)


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
