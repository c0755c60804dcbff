"""Suggestions from facts, and their arguments, which a command line accepts."""

import re
import shlex
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from trainer.cli.compose import compose, load_and_require_read
from trainer.look.facts import Facts, Settings, count_aspects, summarize
from trainer.look.suggestions import suggest

GOOD = Settings(
    source="image_folder", image_size=224, sizes=(96, 128, 160, 192, 224), min_size=32, resize="stretch",
    orientation="exif", on_error="fail", class_weights=False, augmented=True, validation_fraction=0.2,
    test_fraction=0.0, group_field=None, is_trial=False,
)  # fmt: skip
COUNTS = {"train": [400, 410], "validation": [100, 100], "test": [100, 100]}


def make_facts(settings: dict[str, Any] | None = None, **changes: Any) -> Facts:
    """Facts that lead to no suggestion, with these changes."""
    sides, shape = summarize([300.0] * 4), summarize([1.3] * 4)
    values = {
        "name": "photos", "settings": replace(GOOD, **(settings or {})), "class_names": ("cat", "dog"),
        "counts": COUNTS, "from_train": ("validation",), "files": 0, "examined": {"train": 4}, "formats": {"JPEG": 4},
        "modes": {"RGB": 4}, "orientations": {1: 4}, "width": sides, "height": sides, "shorter_side": sides,
        "elongation": shape, "aspects": count_aspects(np.array([1.3] * 4)),
        "frequent_sizes": [], "copies": {"images": 0, "groups": 0, "across_splits": 0, "different_labels": 0},
        "duplicates": {"across_splits": 0, "different_labels": 0, "within_one_split_and_class": 0, "groups": []},
        "skipped": (), "undecodable": (), "notes": (), "group_fields": {},
    }  # fmt: skip
    return Facts(**(values | changes))  # type: ignore[arg-type]


def make_duplicates(across: int, labels: int) -> dict[str, Any]:
    return {"across_splits": across, "different_labels": labels, "within_one_split_and_class": 0, "groups": []}


def test_good_data_has_no_suggestion() -> None:
    assert suggest(make_facts()) == []


@pytest.mark.parametrize(
    ("settings", "changes", "arguments", "reason"),
    [
        ({}, {"skipped": ("a.jpg: is empty",)}, "data.on_error=skip", "1 file or record cannot be read"),
        ({}, {"undecodable": ("a.jpg: bad", "b.jpg: bad")}, "data.on_error=skip", "2 files or records"),
        ({"orientation": "ignore"}, {"orientations": {1: 3, 6: 1}}, "data.orientation=exif", "1 examined image of 4"),
        ({}, {"duplicates": make_duplicates(3, 0)}, "", "3 images are in several splits"),
        ({}, {"duplicates": make_duplicates(0, 1)}, "", "1 image has copies with another label"),
        ({}, {"counts": COUNTS | {"train": [1300, 400]}}, "training.class_weights=balanced", "cat has 1,300 .* dog 400"),
        ({}, {"counts": {k: COUNTS[k] for k in ("train", "validation")}}, "data.test_fraction=0.15", "no test split"),
        ({"validation_fraction": 0.0}, {"counts": {k: COUNTS[k] for k in ("train", "test")}, "from_train": ()}, "data.validation_fraction=0.2", "no validation split"),
        ({"validation_fraction": 0.1}, {"counts": COUNTS | {"validation": [45, 45]}}, "data.validation_fraction=0.12", "only 90 examples: each is 1.1 points"),
        ({}, {"counts": COUNTS | {"test": [9, 9]}}, "", "test has only 18 examples: each is 5.6 points"),
        ({"image_size": 96}, {}, "model.image_size=160", "300 px or more on the shorter side, and are reduced to 96"),
        ({}, {"shorter_side": summarize([64.0])}, "model.image_size=96", "at most 64 px .* 18 % of the time"),
        ({"sizes": ()}, {"shorter_side": summarize([64.0])}, "model.image_size=64", "8 % of the time"),
        ({}, {"elongation": summarize([1.8])}, "model.resize=crop", "is 1.8 times the shorter one"),
        ({}, {"aspects": {"3:4 to square": 1, "square": 0, "square to 4:3": 1}, "elongation": summarize([1.33])}, "model.resize=crop", "50 % of the images are portraits"),
        ({"resize": "crop"}, {"elongation": summarize([2.5])}, "model.resize=stretch", "lose 60 % or more"),
        ({"augmented": False}, {"counts": COUNTS | {"train": [50, 70]}}, "augmentation=light", "60 training examples per class"),
        ({"source": "tfds"}, {"group_fields": {"the camera's": 3, "year": 7}}, "'data.group_field=the camera'\"'\"'s'", "3 different values .*: year"),
    ],
)  # fmt: skip
def test_a_suggestion_has_a_reason_and_arguments_that_exist(
    settings: dict[str, Any], changes: dict[str, Any], arguments: str, reason: str
) -> None:
    (suggestion,) = suggest(make_facts(settings, **changes))
    assert suggestion.arguments == arguments
    assert re.search(reason, suggestion.reason), suggestion.reason
    source = ["data=tfds", "data.root=x"] if settings.get("source") == "tfds" else ["data=image_folder", "data.root=x"]
    given = [*source, "model=mobilenet_v2", *shlex.split(suggestion.arguments)]
    composed = compose(given)
    assert composed is not None
    load_and_require_read(composed, given)
    key, equals, value = suggestion.arguments.partition("=")
    if equals and "'" not in key and "." in key:
        section, name = key.split(".")
        assert str(composed[section][name]) == value


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({"on_error": "skip"}, {"skipped": ("a.jpg: is empty",)}),
        ({"class_weights": True}, {"counts": COUNTS | {"train": [1300, 400]}}),
        ({"source": "digits"}, {"counts": {"train": [400, 400]}, "from_train": ()}),
        ({"source": "tfrecords"}, {"counts": {k: COUNTS[k] for k in ("train", "validation")}, "files": 2}),
        ({"is_trial": True, "augmented": False}, {"counts": {"train": [9, 9], "validation": [1, 1]}}),
        ({}, {"shorter_side": {}, "elongation": {}, "aspects": {}}),
        ({"source": "tfds", "group_field": "year"}, {"group_fields": {"year": 7}}),
    ],
)
def test_what_is_configured_or_cannot_be_changed_is_not_suggested(
    settings: dict[str, Any], changes: dict[str, Any]
) -> None:
    assert suggest(make_facts(settings, **changes)) == []
