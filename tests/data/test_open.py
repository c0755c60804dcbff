"""Opening every source: splits, labels, limits, fingerprints, and what a person is told."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.pictures import fill_folder, picture
from trainer.config.schema import Data, load
from trainer.data.open import open_dataset, open_run_dataset, require_validation
from trainer.data.records import RecordAt, index_shard, read_image
from trainer.data.splits import at_most, part_sizes, per_class, take
from trainer.data.tfds_writer import LabelledImages, WriteOptions, write_dataset
from trainer.errors import DataError
from trainer.types import Dataset, Shard, Split

LAYOUT = "expected are ROOT/<class>/*.jpg, or ROOT/train/<class>/*.jpg with validation/ and test/ beside train/"
CLASSES = ("cat", "dog", "owl")


def opened(
    cache: Path, *, seed: int = 1, max_examples: int | None = None, said: list[str] | None = None, **data: Any
) -> Dataset:
    note = (said if said is not None else []).append
    return open_dataset(Data(**data), seed=seed, cache_dir=cache, max_examples=max_examples, note=note)


def refusal(cache: Path, **data: Any) -> str:
    with pytest.raises(DataError) as error:
        opened(cache, **data)
    return str(error.value)


def folder(cache: Path, root: Path, **data: Any) -> Dataset:
    return opened(cache, source="image_folder", root=str(root), **data)


def folder_refusal(cache: Path, root: Path, **data: Any) -> str:
    return refusal(cache, source="image_folder", root=str(root), **data)


def records(split: Split) -> list[bytes]:
    """The images of a record split, in the order of its examples."""
    found = []
    for shard in split.shards:
        index = index_shard(shard.path)
        for n in range(shard.start, shard.stop):
            at = RecordAt(shard.path, n, int(index.offsets[n]), int(index.lengths[n]), split.image_field)
            found.append(read_image(at))
    return found


def write_records(root: Path, labels: dict[str, list[int]], shards: int = 1) -> Path:
    """A TFDS folder whose image k is picture(k), counted over the splits."""
    first, splits = 0, {}
    for name, values in labels.items():
        splits[name] = [(picture(first + k), label) for k, label in enumerate(values)]
        first += len(values)
    write_dataset(root, LabelledImages("pets", CLASSES, splits), WriteOptions(shards=shards))
    return root


# --- digits ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    opened(cache, source="digits")
    return cache


def test_digits_have_their_fixed_splits(digits_cache: Path) -> None:
    dataset = opened(digits_cache, source="digits")
    assert {name: split.count for name, split in dataset.splits.items()} == {
        "train": 1257,
        "validation": 180,
        "test": 360,
    }
    assert dataset.class_names == tuple("0123456789")
    for split in dataset.splits.values():
        share = np.bincount(split.labels) / split.count
        assert abs(share - 0.1).max() < 0.01
        assert split.labels.dtype == np.int32


def test_digits_are_the_pixels_of_scikit_learn(digits_cache: Path) -> None:
    import io

    from PIL import Image
    from sklearn.datasets import load_digits

    source = load_digits()
    known = {  # pixels to digit
        np.round(i * 255 / 16).astype(np.uint8).tobytes(): t for i, t in zip(source.images, source.target, strict=True)
    }
    test = opened(digits_cache, source="digits").splits["test"]
    for image, label in zip(records(test), test.labels, strict=True):
        decoded = Image.open(io.BytesIO(image))
        assert (decoded.format, decoded.mode, decoded.size) == ("PNG", "L", (8, 8))
        assert known[decoded.tobytes()] == label


def test_two_processes_may_start_at_once(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from trainer.config.schema import Data\n"
        "from trainer.data.open import open_dataset\n"
        "d = open_dataset(Data(source='digits'), seed=1, cache_dir=Path(sys.argv[1]), max_examples=None, note=print)\n"
        "print(d.fingerprint, d.splits['train'].count, 'tensorflow' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(2)
    ]
    lines = [process.communicate()[0].splitlines()[-1] for process in both]
    assert lines[0] == lines[1]
    assert lines[0].endswith(" 1257 False")  # nothing here waits for TensorFlow's import
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digits", "labels"]


# --- image folders ---------------------------------------------------------------------------------------------------


def test_a_folder_is_split_by_fraction_in_every_class(tmp_path: Path) -> None:
    root = fill_folder(tmp_path / "pets", {"cat": 50, "dog": 20})
    dataset = folder(tmp_path, root, test_fraction=0.1)
    assert dataset.name == "pets"
    assert {n: np.bincount(s.labels).tolist() for n, s in dataset.splits.items()} == {
        "train": [35, 14],
        "validation": [10, 4],
        "test": [5, 2],
    }
    files = [set(split.files) for split in dataset.splits.values()]
    assert len(set.union(*files)) == sum(map(len, files)) == 70
    for split in dataset.splits.values():
        assert [("cat", "dog").index(Path(file).parent.name) for file in split.files] == split.labels.tolist()
    again = folder(tmp_path, root, test_fraction=0.1)
    assert [split.files for split in again.splits.values()] == [split.files for split in dataset.splits.values()]
    other = folder(tmp_path, root, test_fraction=0.1, split_seed=7)
    assert set(other.splits["test"].files) != set(dataset.splits["test"].files)


def test_a_new_picture_moves_hardly_any_other(tmp_path: Path) -> None:
    root = fill_folder(tmp_path / "pets", {"cat": 50, "dog": 50})
    before = set(folder(tmp_path, root).splits["validation"].files)
    (root / "cat" / "new.jpg").write_bytes(picture(1000))
    assert len(before - set(folder(tmp_path, root).splits["validation"].files)) <= 1


def test_the_classes_are_mixed_from_the_start(tmp_path: Path) -> None:
    labels = folder(tmp_path, fill_folder(tmp_path / "pets", {"cat": 50, "dog": 50})).splits["train"].labels
    assert 10 < labels[:40].sum() < 30


def test_what_counts_as_a_picture(tmp_path: Path) -> None:
    root = fill_folder(tmp_path / "pets", {"cat": 5, "dog": 5})
    (root / "cat" / "deep" / "er").mkdir(parents=True)
    (root / "cat" / "deep" / "er" / "A.JPEG").write_bytes(picture(100))
    (root / "dog" / "b.Png").write_bytes(picture(101, "PNG"))
    (root / "dog" / "c.bmp").write_bytes(picture(102, "BMP"))
    (root / "dog" / "d.gif").write_bytes(picture(103, "GIF"))
    (root / "dog" / ".hidden.jpg").write_bytes(b"no")
    (root / ".git").mkdir()
    (root / "dog" / "e.webp").write_bytes(b"no")
    (root / "cat" / "back").symlink_to(root / "cat")  # a circle ends
    dataset = folder(tmp_path, root)
    assert sorted(Path(f).name for s in dataset.splits.values() for f in s.files if "0" not in Path(f).name) == [
        "A.JPEG",
        "b.Png",
        "c.bmp",
        "d.gif",
    ]
    assert dataset.class_names == ("cat", "dog")
    assert "files that are no jpg/jpeg/png/bmp/gif by name were ignored: 1 .webp" in dataset.notes


@pytest.mark.parametrize("validation", ["validation", "val", "valid"])
def test_split_folders_are_taken_as_they_are(tmp_path: Path, validation: str) -> None:
    for start, (part, count) in enumerate({"train": 10, validation: 4, "test": 3}.items()):
        fill_folder(tmp_path / "pets" / part, {"cat": count, "dog": count}, 100 * start)
    dataset = folder(tmp_path, tmp_path / "pets", test_fraction=0.5)
    assert {n: s.count for n, s in dataset.splits.items()} == {"train": 20, "validation": 8, "test": 6}
    assert {Path(f).parts[-3] for f in dataset.splits["validation"].files} == {validation}


def test_a_missing_validation_folder_is_taken_from_train(tmp_path: Path) -> None:
    fill_folder(tmp_path / "pets" / "train", {"cat": 10, "dog": 10})
    fill_folder(tmp_path / "pets" / "test", {"cat": 3, "dog": 3}, 100)
    dataset = folder(tmp_path, tmp_path / "pets")
    assert {n: s.count for n, s in dataset.splits.items()} == {"train": 16, "validation": 4, "test": 6}


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    root = fill_folder(tmp_path / "pets", {"cat": 10, "dog": 10})
    shutil.copytree(root, tmp_path / "elsewhere" / "animals")
    first = folder(tmp_path, root).fingerprint
    assert first == folder(tmp_path, tmp_path / "elsewhere" / "animals").fingerprint
    assert len(first) == 16
    others = {
        first,
        folder(tmp_path, root, split_seed=1).fingerprint,
        folder(tmp_path, root, labels_per_class=3).fingerprint,
    }
    (root / "cat" / "00.jpg").write_bytes(picture(500))
    others.add(folder(tmp_path, root).fingerprint)
    (root / "cat").rename(root / "lion")
    others.add(folder(tmp_path, root).fingerprint)
    assert len(others) == 5


def test_other_layouts_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    assert folder_refusal(tmp_path, root) == f"data.root={root} does not exist (seen from {os.getcwd()}): {LAYOUT}"
    root.write_text("")
    assert folder_refusal(tmp_path, root) == f"data.root={root} is a file, not a folder: {LAYOUT}"
    root.unlink()
    root.mkdir()
    assert folder_refusal(tmp_path, root) == f"data.root={root} is empty: {LAYOUT}"
    (root / "a.txt").write_text("")
    assert folder_refusal(tmp_path, root) == f"data.root={root} has no class folders: {LAYOUT}"
    (root / "a.jpg").write_bytes(picture(1))
    assert folder_refusal(tmp_path, root) == f"data.root={root} has 1 picture but no class folders: {LAYOUT}"
    (root / "cat").mkdir()
    (root / "dog").mkdir()
    assert folder_refusal(tmp_path, root) == (
        f"data.root={root} has class folders (cat, dog) but no pictures in them: {LAYOUT}"
    )
    fill_folder(root, {"cat": 3})
    assert folder_refusal(tmp_path, root) == (
        "no training example of dog: add some, leave the class out, or choose another split"
    )


def test_an_unreadable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    assert folder_refusal(tmp_path, tmp_path / "circle") == (
        f"data.root={tmp_path}/circle cannot be read (Too many levels of symbolic links): {LAYOUT}"
    )


def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    root = fill_folder(tmp_path / "pets", {"cat": 3, "dog": 3})
    root.chmod(0)
    before = os.geteuid()
    try:
        if before == 0:  # root may read everything
            os.seteuid(65534)
        message = folder_refusal(tmp_path, root)
    finally:
        os.seteuid(before)
        root.chmod(0o700)
    assert message == f"data.root={root} cannot be read (Permission denied): {LAYOUT}"


def test_one_class_is_not_enough(tmp_path: Path) -> None:
    root = fill_folder(tmp_path / "pets", {"animals/cat": 3, "animals/dog": 3})
    assert folder_refusal(tmp_path, root) == (
        f"data.root={root} has only one class folder (animals), and telling classes apart takes two: "
        f"did you mean data.root={root}/animals?"
    )
    other = fill_folder(tmp_path / "cats", {"cat": 3})
    assert folder_refusal(tmp_path, other) == (
        f"data.root={other} has only one class folder (cat), and telling classes apart takes two: {LAYOUT}"
    )


def test_split_folders_that_contradict_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    fill_folder(root / "val", {"cat": 2, "dog": 2})
    assert folder_refusal(tmp_path, root) == f"data.root={root} has val but no train folder: {LAYOUT}"
    fill_folder(root / "train", {"cat": 5, "owl": 5}, 50)
    assert folder_refusal(tmp_path, root) == (
        f"the class folders of {root}/val and {root}/train differ in dog, owl: val lacks owl and also has dog"
    )
    fill_folder(root / "validation", {"cat": 2, "owl": 2}, 90)
    assert folder_refusal(tmp_path, root) == (
        f"{root}/val and {root}/validation are both taken for validation: remove one"
    )
    shutil.rmtree(root / "val")
    shutil.rmtree(root / "validation")
    (root / "validation").symlink_to(root / "train")
    assert folder_refusal(tmp_path, root) == (
        f"validation and train are the same folder ({root}/train): what is trained on cannot be scored"
    )
    (root / "validation").unlink()
    fill_folder(root / "extra", {"cat": 2})
    assert folder_refusal(tmp_path, root) == (
        f"data.root={root} has both split folders (train) and others (extra): {LAYOUT}"
    )


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert folder(tmp_path, fill_folder(tmp_path / "a", {"train": 4, "car": 4})).class_names == ("car", "train")


def test_files_that_are_no_pictures_fail_or_are_skipped(tmp_path: Path) -> None:
    root = fill_folder(tmp_path / "pets", {"cat": 8, "dog": 8})
    (root / "cat" / "01.jpg").write_bytes(b"")
    (root / "dog" / "02.jpg").write_bytes(b"<html>not found</html>")
    (root / "dog" / "03.jpg").write_bytes(b"RIFF\x10\x00\x00\x00WEBPVP8 ")
    reasons = [
        f"{root}/cat/01.jpg: is empty",
        f"{root}/dog/02.jpg: does not begin like a JPEG, PNG, BMP or GIF",
        f"{root}/dog/03.jpg: does not begin like a JPEG, PNG, BMP or GIF (it is WebP)",
    ]
    assert folder_refusal(tmp_path, root) == (
        "3 files are no JPEG, PNG, BMP or GIF; repair or remove them, or set data.on_error=skip:\n  "
        + "\n  ".join(reasons)
    )
    dataset = folder(tmp_path, root, on_error="skip")
    assert list(dataset.skipped) == reasons
    assert sum(split.count for split in dataset.splits.values()) == 13
    assert f"3 skipped (data.on_error=skip), the first: {reasons[0]}" in dataset.notes


# --- limits and notes ------------------------------------------------------------------------------------------------


def test_labels_per_class_keeps_that_many_by_seed(tmp_path: Path) -> None:
    root = fill_folder(tmp_path / "pets", {"cat": 20, "dog": 20, "owl": 3})
    said: list[str] = []
    few = folder(tmp_path, root, labels_per_class=5, said=said)
    whole = folder(tmp_path, root)
    assert np.bincount(few.splits["train"].labels).tolist() == [5, 5, 2]
    assert set(few.splits["train"].files) < set(whole.splits["train"].files)
    assert few.splits["validation"].files == whole.splits["validation"].files
    assert folder(tmp_path, root, labels_per_class=5).splits["train"].files == few.splits["train"].files
    assert folder(tmp_path, root, labels_per_class=5, seed=2).splits["train"].files != few.splits["train"].files
    assert "data.labels_per_class=5: all there are of owl" in said


def test_max_examples_mixes_the_classes(tmp_path: Path) -> None:
    dataset = folder(tmp_path, fill_folder(tmp_path / "pets", {"cat": 40, "dog": 40, "owl": 10}), max_examples=6)
    assert {n: np.bincount(s.labels).tolist() for n, s in dataset.splits.items()} == {
        "train": [2, 2, 2],
        "validation": [2, 2, 2],
    }


def test_limits_on_records_keep_the_right_records() -> None:
    labels = np.random.default_rng(0).integers(0, 3, 30).astype(np.int32)
    split = Split("train", labels[2:28], shards=(Shard("a", 15, 2, 15), Shard("b", 15, 0, 13)))
    for limited in (per_class(split, 2, 1), at_most(split, 7, 1), take(split, np.arange(26))):
        numbers = [s.start + k + 15 * (s.path == "b") for s in limited.shards for k in range(s.stop - s.start)]
        assert labels[numbers].tolist() == limited.labels.tolist()
        assert numbers == sorted(set(numbers))
        assert [limited.name_of(i) for i in range(limited.count)] == [f"{'ab'[n // 15]}#{n % 15}" for n in numbers]
    assert np.bincount(per_class(split, 2, 1).labels).tolist() == [2, 2, 2]
    assert take(split, np.arange(26)).shards == split.shards
    assert take(split, np.zeros(0, int)).shards == ()


def test_part_sizes_leave_something_to_train_on() -> None:
    fractions = {"validation": 0.2, "test": 0.1}
    sizes = {n: tuple(part_sizes(n, fractions).values()) for n in (1, 2, 3, 10, 100)}
    assert sizes == {1: (0, 0), 2: (1, 0), 3: (1, 1), 10: (2, 1), 100: (20, 10)}
    assert part_sizes(10, {"validation": 0.0}) == {"validation": 0}


def test_imbalance_tiny_splits_and_copies_are_noted(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    said: list[str] = []
    fill_folder(root / "train", {"cat": 20, "dog": 5, "owl": 6})
    fill_folder(root / "validation", {"cat": 2, "dog": 2, "owl": 1}, 100)
    (root / "validation" / "owl" / "00.jpg").unlink()
    shutil.copy(root / "train" / "cat" / "03.jpg", root / "validation" / "cat" / "00.jpg")
    dataset = folder(tmp_path, root, said=said)
    assert (
        said
        == list(dataset.notes)
        == [
            "training examples per class differ 4.0-fold (dog 5, owl 6, cat 20): "
            "training.class_weights=balanced may help",
            "validation has only 4 examples: each is 25.0 points of accuracy",
            "validation has no example of owl",
            "1 of the 4 files of validation also lies byte for byte in train, the first: "
            f"{root}/validation/cat/00.jpg = {root}/train/cat/03.jpg",
        ]
    )


# --- TFDS ------------------------------------------------------------------------------------------------------------


def test_a_tfds_folder_gives_its_splits(tmp_path: Path) -> None:
    labels = {"train": [0, 1, 2] * 10, "validation": [0, 1, 2] * 2, "test": [2, 1, 0]}
    dataset = opened(tmp_path, source="tfds", root=str(write_records(tmp_path / "pets", labels, shards=3)))
    assert dataset.class_names == CLASSES
    assert {n: s.labels.tolist() for n, s in dataset.splits.items()} == labels
    assert records(dataset.splits["test"]) == [picture(36), picture(37), picture(38)]
    assert [(s.count, s.start, s.stop) for s in dataset.splits["train"].shards] == [(10, 0, 10)] * 3


def test_split_strings_with_slices(tmp_path: Path) -> None:
    root = str(write_records(tmp_path / "pets", {"train": [0, 1, 2] * 10}, shards=3))
    dataset = opened(
        tmp_path,
        source="tfds",
        root=root,
        train_split="train[:50%]+train[90%:]",
        validation_split="train[50%:70%]",
        test_split="train[70%:90%]",
    )
    assert records(dataset.splits["train"]) == [picture(k) for k in (*range(15), 27, 28, 29)]
    assert records(dataset.splits["validation"]) == [picture(k) for k in range(15, 21)]
    assert records(dataset.splits["test"]) == [picture(k) for k in range(21, 27)]


def test_validation_is_the_tail_of_train_where_that_is_fair(tmp_path: Path) -> None:
    root = str(write_records(tmp_path / "pets", {"train": [0, 1, 2] * 20}, shards=2))
    dataset = opened(tmp_path, source="tfds", root=root, validation_fraction=0.2, test_fraction=0.1)
    assert records(dataset.splits["validation"]) == [picture(k) for k in range(42, 54)]
    assert records(dataset.splits["test"]) == [picture(k) for k in range(54, 60)]
    assert dataset.splits["train"].count == 42


def test_validation_is_drawn_where_train_lies_sorted(tmp_path: Path) -> None:
    root = str(write_records(tmp_path / "pets", {"train": [0] * 20 + [1] * 20 + [2] * 20}))
    said: list[str] = []
    dataset = opened(tmp_path, source="tfds", root=root, said=said)
    assert np.bincount(dataset.splits["validation"].labels).tolist() == [4, 4, 4]
    assert np.bincount(dataset.splits["train"].labels).tolist() == [16, 16, 16]
    both = records(dataset.splits["train"]) + records(dataset.splits["validation"])
    assert sorted(both) == sorted(picture(k) for k in range(60))
    assert (
        "the tail of the training records lacks classes (they lie sorted), so validation was drawn record by record "
        "with data.split_seed=42; shards written by python -m trainer.prepare read faster, or set data.validation_split"
    ) in said


def test_labels_are_read_once(tmp_path: Path) -> None:
    root = str(write_records(tmp_path / "pets", {"train": [0, 1, 2] * 10}, shards=3))
    said: list[str] = []
    first = opened(tmp_path, source="tfds", root=root, said=said)
    assert f"reading the labels of 3 shards (once; they are kept in {tmp_path}/labels)" in said
    said.clear()
    second = opened(tmp_path, source="tfds", root=root, said=said)
    assert not [line for line in said if "reading the labels" in line]
    assert second.fingerprint == first.fingerprint
    assert second.splits["train"].labels.tolist() == first.splits["train"].labels.tolist()
    shutil.copytree(root, tmp_path / "elsewhere")
    assert opened(tmp_path, source="tfds", root=str(tmp_path / "elsewhere")).fingerprint == first.fingerprint


def test_overlapping_splits_are_refused_or_noted(tmp_path: Path) -> None:
    root = str(write_records(tmp_path / "pets", {"train": [0, 1, 2] * 10, "test": [0, 1, 2]}))
    assert refusal(tmp_path, source="tfds", root=root, validation_split="train[80%:]") == (
        "data.train_split=train and data.validation_split=train[80%:] share 6 examples: "
        "what is trained on cannot be scored"
    )
    assert "validation and test share 3 examples: the test score also chose the checkpoint" in (
        opened(tmp_path, source="tfds", root=root, validation_split="test").notes
    )


def test_missing_tfds_datasets_say_what_to_type(tmp_path: Path) -> None:
    where = f"data.root={tmp_path}/gone holds no prepared dataset (no dataset_info.json in it): "
    assert (
        refusal(tmp_path, source="tfds", root=f"{tmp_path}/gone") == where + "write one with python -m trainer.prepare"
    )
    write_records(tmp_path / "gone" / "1.0.0", {"train": [0, 1, 2]})
    assert refusal(tmp_path, source="tfds", root=f"{tmp_path}/gone") == where + (
        f"did you mean data.root={tmp_path}/gone/1.0.0?"
    )
    assert refusal(tmp_path, source="tfds", name="beans", data_dir=str(tmp_path)) == (
        f"the dataset beans is not prepared in {tmp_path}: set data.download=true to download it, "
        "or data.data_dir to where it lies"
    )
    assert refusal(tmp_path, source="tfds", name="tf_flower", data_dir=str(tmp_path)) == (
        f"TFDS knows no dataset 'tf_flower', and none of that name is prepared in {tmp_path}. Did you mean tf_flowers?"
    )
    bad = write_records(tmp_path / "bad", {"train": [0, 1, 2]})
    (bad / "dataset_info.json").write_text("{")
    assert refusal(tmp_path, source="tfds", root=str(bad)).startswith(
        f"data.root={bad} is no TFDS folder that can be read: "
    )


def test_a_prepared_dataset_is_found_by_name(tmp_path: Path) -> None:
    write_records(tmp_path / "pets" / "1.0.0", {"train": [0, 1, 2] * 5, "test": [0, 1, 2]})
    dataset = opened(tmp_path, source="tfds", name="pets", data_dir=str(tmp_path))
    assert {n: s.count for n, s in dataset.splits.items()} == {"train": 12, "validation": 3, "test": 3}


def test_wrong_splits_fields_and_formats_are_named(tmp_path: Path) -> None:
    root = write_records(tmp_path / "pets", {"train": [0, 1, 2] * 10})
    data: dict[str, Any] = {"source": "tfds", "root": str(root)}
    assert refusal(tmp_path, **data, train_split="training").startswith(
        "data.train_split=training: pets has no such split ("
    )
    assert refusal(tmp_path, **data, train_split="training").endswith("; it has train (30)")
    assert refusal(tmp_path, **data, validation_split="train[:0]") == "data.validation_split=train[:0] of pets is empty"
    shown = "image (Image), label (ClassLabel)"
    assert refusal(tmp_path, **data, image_field="photo") == (
        f"pets has no feature 'photo' (it has {shown}): set data.image_field=image"
    )
    assert refusal(tmp_path, **data, label_field="image") == (
        f"pets has no ClassLabel as 'image' (it has {shown}): set data.label_field=label"
    )
    info = json.loads((root / "dataset_info.json").read_text())
    (root / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "array_record"}))
    assert refusal(tmp_path, **data) == (
        "pets is stored as array_record, and only tfrecord is read: prepare it with file_format=tfrecord"
    )


def test_damaged_shards_fail_or_are_skipped(tmp_path: Path) -> None:
    root = write_records(tmp_path / "pets", {"train": [0, 1, 2] * 10}, shards=2)
    first, second = sorted(root.glob("*.tfrecord*"))
    os.truncate(second, second.stat().st_size - 10)
    data: dict[str, Any] = {"source": "tfds", "root": str(root)}
    assert refusal(tmp_path, **data) == (
        f"shard {second} is truncated: it ends inside record 14, 10 bytes early; "
        "fetch or write it again, or set data.on_error=skip to use the records before it"
    )
    content = bytearray(first.read_bytes())
    content[int(index_shard(first).offsets[3]) + 50] ^= 1
    first.write_bytes(bytes(content))
    assert refusal(tmp_path, **data) == (
        f"record 3 of shard {first} is damaged (its checksum does not fit); "
        "write it again, or set data.on_error=skip to leave it out"
    )
    dataset = opened(tmp_path, **data, on_error="skip", validation_fraction=0)
    assert dataset.splits["train"].count == 28
    assert records(dataset.splits["train"]) == [picture(k) for k in range(29) if k != 3]
    assert list(dataset.skipped) == [
        f"record 3 of shard {first} is damaged (its checksum does not fit)",
        f"shard {second} is truncated: it ends inside record 14, 10 bytes early",
    ]
    second.unlink()
    assert refusal(tmp_path, **data, on_error="skip") == f"shard {second} cannot be read: No such file or directory"


def test_a_shard_of_another_length_is_named(tmp_path: Path) -> None:
    root = write_records(tmp_path / "pets", {"train": [0, 1, 2] * 10}, shards=2)
    first, second = sorted(root.glob("*.tfrecord*"))
    first.write_bytes(first.read_bytes() + second.read_bytes())
    assert refusal(tmp_path, source="tfds", root=str(root)) == (
        f"shard {first} holds 30 records where dataset_info.json says 15; prepare the dataset again, "
        "or set data.on_error=skip to use what is there"
    )


# --- TFRecord patterns -----------------------------------------------------------------------------------------------


def test_a_pattern_is_split_by_files(tmp_path: Path) -> None:
    write_records(tmp_path / "pets", {"train": [0, 1, 2] * 10}, shards=5)
    data: dict[str, Any] = {"source": "tfrecords", "pattern": f"{tmp_path}/pets/*.tfrecord*", "class_names": CLASSES}
    dataset = opened(tmp_path, **data, test_fraction=0.2)
    assert {n: len(s.shards) for n, s in dataset.splits.items()} == {"train": 3, "validation": 1, "test": 1}
    assert records(dataset.splits["validation"]) == [picture(k) for k in range(6)]
    assert records(dataset.splits["test"]) == [picture(k) for k in range(6, 12)]
    assert dataset.name == "pets"
    one: dict[str, Any] = {**data, "pattern": f"{tmp_path}/pets/*-00000-of*"}
    assert refusal(tmp_path, **one) == (
        f"data.pattern={one['pattern']} fits 1 file, too few for the splits train, validation: "
        "write more shards (python -m trainer.prepare), or set data.validation_fraction=0"
    )
    assert list(opened(tmp_path, **one, validation_fraction=0).splits) == ["train"]
    none: dict[str, Any] = {**data, "pattern": f"{tmp_path}/*.rec"}
    assert refusal(tmp_path, **none) == f"no file fits data.pattern={tmp_path}/*.rec (seen from {os.getcwd()})"
    shard = f"{tmp_path}/pets/pets-train.tfrecord-00000-of-00005"
    assert refusal(tmp_path, **data, label_field="class") == (
        f"record 0 of shard {shard} has no field 'class'; it has image (bytes), label (int64): set data.label_field"
    )
    assert refusal(tmp_path, **{**data, "class_names": ("cat", "dog")}) == (
        f"the label 2 in the field 'label' of record 2 of shard {shard} is outside 0..1: there are 2 class names"
    )
    assert refusal(tmp_path, **{**data, "class_names": ("cat", "cat", "owl")}) == (
        "pets has a class name twice: cat, cat, owl"
    )
    assert refusal(tmp_path, **{**data, "class_names": (*CLASSES, "yak")}) == (
        "no training example of yak: add some, leave the class out, or choose another split"
    )


def test_overfitting_trains_on_one_batch_and_scores_it(tmp_path: Path) -> None:
    fill_folder(tmp_path / "photos", dict.fromkeys(CLASSES, 10))
    config = load({
        "data": {"source": "image_folder", "root": str(tmp_path / "photos"), "test_fraction": 0.2},
        "model": {"backbone": "MobileNetV2"}, "phases": {"head": {"thaw": "none", "epochs": 1}},
        "training": {"batch_size": 6}, "debug": {"overfit": True}, "runtime": {"cache_dir": str(tmp_path / "cache")},
    })  # fmt: skip
    dataset = open_run_dataset(config, config.data, lambda _: None)
    assert {name: split.files for name, split in dataset.splits.items()} == {
        "train": dataset.splits["train"].files, "validation": dataset.splits["train"].files
    }  # fmt: skip
    assert dataset.splits["train"].count == 6
    require_validation(dataset)


def test_a_run_needs_something_to_validate_on() -> None:
    train = Split("train", np.zeros(3, np.int32), files=("a", "b", "c"))
    with pytest.raises(
        DataError, match=r"nothing to validate on: set data\.validation_fraction or data\.validation_split"
    ):
        require_validation(Dataset("x", ("a", "b"), {"train": train}, ""))
