"""Copies are detected whatever was done to the file; similar images are not."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from trainer.evaluation import duplicates
from trainer.evaluation.duplicates import find_duplicates, hash_thumbnails, make_thumbnails

SIDE = 96


def draw_photo(seed: int) -> Image.Image:
    """Return an image with structure at every scale, 300 x 200."""
    rng = np.random.default_rng(seed)
    layers = [
        np.asarray(Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize((300, 200), 3), np.float32)
        for n in (3, 6, 12, 40)
    ]
    return Image.fromarray(np.clip(sum(layers) / 4 + 1.5 * (sum(layers) / 4 - 128), 0, 255).astype(np.uint8))


def to_pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def save_and_open(image: Image.Image, quality: int) -> Image.Image:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return Image.open(out).convert("RGB")


COPIES: dict[str, Any] = {
    "the same": lambda i: i,
    "JPEG at quality 30": lambda i: save_and_open(i, 30),
    "half the size": lambda i: i.resize((150, 100), Image.Resampling.LANCZOS),
    "brighter": lambda i: ImageEnhance.Brightness(i).enhance(1.1),
    "more contrast": lambda i: ImageEnhance.Contrast(i).enhance(1.1),
    "blurred": lambda i: i.filter(ImageFilter.GaussianBlur(1)),
}


def describe_example(split: str, index: int) -> dict[str, Any]:
    return {"split": split, "index": index, "file": f"{split}/{index}.jpg", "label": "ab"[split == "test"]}


def search(splits: dict[str, tuple[list[np.ndarray], list[int]]]) -> tuple[list[list[tuple[str, int]]], dict[str, Any]]:
    """Return the members of the groups, and `duplicates` of report.json."""
    small = {name: (np.arange(len(images)), make_thumbnails(np.stack(images))) for name, (images, _) in splits.items()}
    facts = find_duplicates(small, {name: np.array(labels) for name, (_, labels) in splits.items()}, describe_example)
    return [[(m["split"], m["index"]) for m in group["members"]] for group in facts["groups"]], facts


def count_groups(facts: dict[str, Any]) -> tuple[int, int, int]:
    return facts["across_splits"], facts["different_labels"], facts["within_one_split_and_class"]


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_in_another_split_is_detected_and_nothing_else(how: str) -> None:
    train = [to_pixels(draw_photo(k)) for k in range(20)]
    test = [to_pixels(draw_photo(100 + k)) for k in range(5)] + [to_pixels(COPIES[how](draw_photo(17)))]
    groups, facts = search({"train": (train, [0] * 20), "test": (test, [0] * 6)})
    assert groups == [[("train", 17), ("test", 5)]]
    assert count_groups(facts) == (1, 0, 0)
    assert facts["compared"] == {"train": 20, "test": 6}


def test_severe_groups_come_first_and_copies_in_one_class_are_only_counted() -> None:
    images = [to_pixels(draw_photo(k)) for k in range(4)]
    train = ([*images, images[0], images[1]], [0, 1, 2, 3, 0, 2])  # 0 twice in a class, 1 in two classes
    test = ([images[2], images[3]], [2, 0])  # 2 across splits; 3 across splits, with another label
    groups, facts = search({"train": train, "test": test})
    assert groups == [[("train", 3), ("test", 1)], [("train", 1), ("train", 5)], [("train", 2), ("test", 0)]]
    assert count_groups(facts) == (2, 2, 1)


def test_many_copies_are_one_group() -> None:
    images = [to_pixels(draw_photo(1))] * 500
    _, facts = search({"train": (images, [0] * 499 + [1])})
    assert [group["count"] for group in facts["groups"]] == [500]


def test_blank_images_are_no_duplicates() -> None:
    blank = [np.full((SIDE, SIDE, 3), grey, np.uint8) for grey in (0, 0, 255)]
    groups, facts = search({"train": (blank, [0, 1, 0]), "test": ([blank[0]], [1])})
    assert (groups, count_groups(facts)) == ([], (0, 0, 0))


def test_images_of_equal_grey_differ_by_colour() -> None:
    red = to_pixels(draw_photo(3)).copy()
    red[..., 1:] //= 4
    blue = red[..., ::-1].copy()
    assert search({"train": ([red], [0]), "test": ([blue], [0])})[0] == []


def test_close_hashes_equal_those_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 300, dtype=np.uint64)
    flipped = [sum(1 << int(b) for b in rng.choice(64, k % 9, replace=False)) for k in range(200)]
    hashes = np.unique(np.concatenate([hashes, hashes[:200] ^ np.array(flipped, np.uint64)]))
    differing = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    expected = {(i, j) for i, j in np.argwhere(differing <= duplicates.MAX_HASH_DISTANCE).tolist() if i < j}
    pairs = np.concatenate([np.stack(both, axis=1) for both in duplicates._iterate_close_pairs(hashes)])
    assert set(map(tuple, np.sort(pairs).tolist())) == expected
    assert len(expected) > 50


def test_a_thumbnail_is_the_mean_over_areas() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    expected = images.reshape(3, 16, 4, 16, 4, 3).mean(axis=(2, 4))
    np.testing.assert_array_equal(make_thumbnails(images), np.rint(expected.astype(np.float32)).astype(np.uint8))
    small = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(make_thumbnails(small), small.repeat(2, axis=1).repeat(2, axis=2))


def test_hashes_are_robust_to_noise() -> None:
    small = make_thumbnails(np.stack([to_pixels(draw_photo(k)) for k in range(20)]))
    noise = np.random.default_rng(0).integers(-2, 3, small.shape)
    hashes, other = hash_thumbnails(small), hash_thumbnails(np.clip(small + noise, 0, 255).astype(np.uint8))
    assert np.bitwise_count(hashes ^ other).max() <= duplicates.MAX_HASH_DISTANCE
    assert np.bitwise_count(hashes[:-1] ^ hashes[1:]).min() > duplicates.MAX_HASH_DISTANCE


@pytest.mark.parametrize("count", [3, 30])
def test_a_group_has_the_labels_of_all_members(count: int) -> None:
    image = to_pixels(draw_photo(1))
    _, facts = search({"train": ([image] * count, [0] * count), "test": ([image], [1])})
    assert count_groups(facts) == (1, 1, 0)
    (group,) = facts["groups"]
    assert (group["count"], group["across_splits"], group["labels"]) == (count + 1, True, ["a", "b"])
    members = [describe_example("train", k) for k in range(count)] + [describe_example("test", 0)]
    assert group["members"] == members[: duplicates.MAX_LISTED_MEMBERS]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_thousand_images_take_a_bounded_time() -> None:
    """All different, or a hundred copies of each of a thousand."""
    import time

    rng = np.random.default_rng(0)
    scenes = rng.integers(0, 256, (1000, 16, 16, 3))
    noisy = np.clip(scenes[np.arange(100_000) % 1000] + rng.integers(-6, 7, (100_000, 16, 16, 3)), 0, 255)
    for small, groups in ((noisy.astype(np.uint8), 1000), (rng.integers(0, 256, noisy.shape, dtype=np.uint8), 0)):
        began = time.process_time()
        facts = find_duplicates(
            {"train": (np.arange(100_000), small)}, {"train": np.zeros(100_000, int)}, describe_example
        )
        assert count_groups(facts) == (0, 0, groups)
        assert time.process_time() - began < 120
