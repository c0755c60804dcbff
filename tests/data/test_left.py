"""What is left of splits and classes after unreadable images and records are skipped."""

from pathlib import Path

import numpy as np
import pytest

from tests.cluster.test_control import clusters, connected, in_threads
from tests.data.images import encode_noise, fill_folder
from tests.data.splits_on_disk import open_pixels as pixels_of
from tests.data.test_open import CLASSES, open_folder, open_logged
from tests.errors import raises
from trainer.config.schema import validate_config
from trainer.data.images import ImageStore, require_readable
from trainer.data.open import OpenedData, require_validation
from trainer.data.records import frame_record, serialize_example
from trainer.errors import DataError
from trainer.types import Dataset, Split


def write_records(path: Path, count: int) -> Path:
    path.write_bytes(b"".join(frame_record(serialize_example(encode_noise(i), i % 3)) for i in range(count)))
    return path


@pytest.mark.parametrize(("empty", "name"), [(0, "validation"), (1, "test")])
def test_a_record_file_without_records_is_named(tmp_path: Path, empty: int, name: str) -> None:
    paths = [write_records(tmp_path / f"{i}.tfrec", 0 if i == empty else 9) for i in range(5)]
    data = {"source": "tfrecords", "pattern": f"{tmp_path}/*.tfrec", "class_names": CLASSES}
    problem = f"the {name} split has no example: {paths[empty]} has 0 records$"
    with raises(DataError, fix="add examples to it, or use another split", problem=problem):
        open_logged(tmp_path, **data, validation_fraction=0.2, test_fraction=0.2)


def test_a_split_of_damaged_records_is_named_with_the_first(tmp_path: Path) -> None:
    paths = [write_records(tmp_path / f"{i}.tfrec", 9) for i in range(5)]
    paths[0].write_bytes(b"".join(frame_record(b"\xff") for _ in range(3)))
    data = {"source": "tfrecords", "pattern": f"{tmp_path}/*.tfrec", "class_names": CLASSES, "on_error": "skip"}
    problem = f"{paths[0]} has 3 records, and 3 were skipped as unreadable, the first: record 0 of shard {paths[0]} is"
    with raises(DataError, fix="repair them, or remove the split", problem=problem):
        open_logged(tmp_path, **data)


@pytest.mark.parametrize("name", ["validation", "test"])
def test_a_split_folder_without_images_is_named(tmp_path: Path, name: str) -> None:
    for start, split in enumerate(("train", "validation", "test")):
        fill_folder(tmp_path / "pets" / split, {"cat": 3, "dog": 3}, 100 * start)
    for path in (tmp_path / "pets" / name).glob("*/*"):
        path.write_bytes(b"no image")
    problem = (
        f"the {name} split has no example: its folder has 6 images below .*, and 6 were skipped .*00.jpg: does not"
    )
    with raises(DataError, fix="remove the split", problem=problem):
        open_folder(tmp_path, tmp_path / "pets", on_error="skip")
    for path in (tmp_path / "pets" / name).glob("*/*"):
        path.unlink()
    with raises(DataError, fix="add examples", problem=f"the {name} split has no example: its folder has 0 images"):
        open_folder(tmp_path, tmp_path / "pets")


def test_one_image_per_class_leaves_none_for_validation(tmp_path: Path) -> None:
    dataset = open_folder(tmp_path, fill_folder(tmp_path / "pets", {"cat": 1, "dog": 1}))
    problem = "leaves no validation examples: there are 2 images of 2 classes"
    with raises(DataError, "data.validation_fraction", 0.2, "add images, at least two of a class", problem):
        require_validation(dataset, 0.2)


def test_what_is_left_is_logged_per_split_and_class(tmp_path: Path) -> None:
    root = fill_folder(tmp_path / "pets", {"cat": 8, "dog": 8})
    (root / "cat" / "01.jpg").write_bytes(b"")
    notes = open_folder(tmp_path, root, on_error="skip", validation_fraction=0).notes
    assert "left after skipping: train 15 (cat 7, dog 8)" in notes


def write_undecodable(root: Path, bad: set[int], name: str = "train") -> Split:
    """A split of six JPEGs, of the classes 0, 1, 0, 1, ..., of which these are truncated."""
    root.mkdir()
    files = [root / f"{i}.jpg" for i in range(6)]
    for number, file in enumerate(files):
        file.write_bytes(encode_noise(number)[: 200 if number in bad else None])
    return Split(name, np.array([0, 1] * 3, np.int32), tuple(map(str, files)))


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_a_class_or_split_that_cannot_be_decoded_ends_the_run(tmp_path: Path, cache: str) -> None:
    def check(bad: set[int], name: str = "train") -> None:
        root = tmp_path / f"{name}{len(bad)}"
        pixels = pixels_of(write_undecodable(root, bad, name), cache, tmp_path, on_error="skip", fingerprint=str(root))
        pixels.read_images(np.arange(6))
        require_readable(pixels, ("cat", "dog"))

    check({1, 3})
    check({1, 3, 5}, "validation")  # a class may be absent there
    with raises(DataError, fix="remove the class", problem="none of the 3 training images of dog .*: .*1.jpg: "):
        check({1, 3, 5})
    with raises(DataError, fix="repair them", problem="none of the 6 test images can be decoded, the first: .*0.jpg: "):
        check(set(range(6)), "test")


def open_store(splits: dict[str, Split], cache: str, folder: Path) -> ImageStore:
    config = validate_config({
        "data": {"source": "image_folder", "root": "x", "on_error": "skip", "cache": cache},
        "model": {"backbone": "MobileNetV2"}, "phases": {"head": {"thaw": "none", "epochs": 1}},
        "runtime": {"cache_dir": str(folder / "cache")},
    })  # fmt: skip
    return ImageStore(OpenedData(Dataset("x", ("cat", "dog"), splits, "f"), {}, None, ""), config, 10, lambda _: None)  # type: ignore[arg-type]


def test_workers_that_each_read_a_part_reject_a_class_that_none_can_decode(tmp_path: Path) -> None:
    splits = {
        "train": write_undecodable(tmp_path / "a", {1, 3, 5}),
        "validation": write_undecodable(tmp_path / "b", {2}),
    }
    stores = [open_store(splits, "none", tmp_path) for _ in range(2)]
    for number, images in enumerate(stores):
        images.read_images("train", [3, 4, 5] if number else [0, 1, 2])
        images.read_images("validation", [2] if number else [0, 1])
        images.require_readable()
    peers = connected(clusters(2), 20, [])
    in_threads(lambda peer: stores[peer.index].gather_unreadable(peer), peers)
    for images in stores:
        assert [line.split("/")[-1].split(":")[0] for line in images.list_undecodable()] == [
            "1.jpg",
            "3.jpg",
            "5.jpg",
            "2.jpg",
        ]
        with raises(DataError, problem="none of the 3 training images of dog can be decoded"):
            images.require_readable()


def test_an_image_store_rejects_such_a_split_when_it_is_cached(tmp_path: Path) -> None:
    splits = {
        "train": write_undecodable(tmp_path / "a", {1, 3, 5}),
        "validation": write_undecodable(tmp_path / "b", {2}),
    }
    images = open_store(splits, "memory", tmp_path)
    images.open_split("validation")
    line = "validation: 1 of 6 images could not be decoded, left are 5 (cat 2, dog 3)"
    assert images.describe_readable_counts() == [line]
    with raises(DataError, problem="none of the 3 training images of dog can be decoded"):
        images.open_split("train")
