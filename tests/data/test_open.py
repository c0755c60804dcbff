"""Opening every source: splits, labels, limits, fingerprints, notes and errors."""

import errno
import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from tests.data.images import encode_noise, fill_folder
from tests.errors import ANY, raises
from tests.processes import run_python
from trainer.config.schema import Data, validate_config
from trainer.data.image_folder import SUPPORTED_LAYOUT_FIX
from trainer.data.open import open_dataset, open_run_dataset, require_validation
from trainer.data.records import index_shard, locate_records, read_image
from trainer.data.splits import SPLITS, compute_split_sizes, select_at_most, select_examples, select_per_class
from trainer.data.tfds_writer import LabeledImages, WriteOptions, write_dataset
from trainer.errors import DataError, Interrupted, TrainerError
from trainer.types import Dataset, Shard, Split

CLASSES = ("cat", "dog", "owl")


def open_logged(cache: Path, notes: list[str] | None = None, **options: Any) -> Dataset:
    """`open_dataset` with these options of it and of `data`."""
    names = ("seed", "max_examples", "streamed", "purpose")
    chosen = {"seed": 1, "max_examples": None} | {name: options.pop(name) for name in names if name in options}
    log_message = (notes if notes is not None else []).append
    return open_dataset(Data(**options), cache_dir=cache, log_message=log_message, **chosen)


def open_folder(cache: Path, root: Path, **data: Any) -> Dataset:
    return open_logged(cache, source="image_folder", root=str(root), **data)


def count_classes(dataset: Dataset) -> dict[str, int]:
    return {name: split.count for name, split in dataset.splits.items()}


def read_encoded_images(split: Split) -> list[bytes]:
    return [read_image(record) for record in locate_records(split)]


def write_records(root: Path, labels: dict[str, list[int]], shards: int = 1) -> Path:
    """A TFDS folder whose image k is noise(k), counted over the splits."""
    first, splits = 0, {}
    for name, values in labels.items():
        splits[name] = [(encode_noise(first + k), label) for k, label in enumerate(values)]
        first += len(values)
    write_dataset(root, LabeledImages("pets", CLASSES, splits), WriteOptions(shards=shards))
    return root


@pytest.fixture(scope="module")
def digits_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    open_logged(cache, source="digits")
    return cache


def test_digits_have_their_fixed_splits(digits_cache: Path) -> None:
    dataset = open_logged(digits_cache, source="digits")
    assert count_classes(dataset) == {"train": 1257, "validation": 180, "test": 360}
    assert dataset.class_names == tuple("0123456789")
    for split in dataset.splits.values():
        assert abs(np.bincount(split.labels) / split.count - 0.1).max() < 0.01
        assert split.labels.dtype == np.int32


def test_digits_are_the_pixels_of_scikit_learn(digits_cache: Path) -> None:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    known = {np.round(p * 255 / 16).astype(np.uint8).tobytes(): label for p, label in zip(pixels, labels, strict=True)}
    test = open_logged(digits_cache, source="digits").splits["test"]
    for image, label in zip(read_encoded_images(test), test.labels, strict=True):
        decoded = Image.open(io.BytesIO(image))
        assert (decoded.format, decoded.mode, decoded.size) == ("PNG", "L", (8, 8))
        assert known[decoded.tobytes()] == label


def test_two_processes_may_start_at_once(tmp_path: Path) -> None:
    """Two forks of a process that has imported the program, which takes longer than to open the data."""
    program = """
    import os, sys
    from pathlib import Path
    import sklearn.datasets
    from trainer.config.schema import Data
    from trainer.data.open import open_dataset
    first = os.fork()
    options = {'cache_dir': Path(sys.argv[1]), 'max_examples': None, 'log_message': lambda _: None}
    d = open_dataset(Data(source='digits'), seed=1, **options)
    line = f"{d.fingerprint} {d.splits['train'].count} {'tensorflow' in sys.modules}\\n"
    os.write(1, line.encode())
    if first:
        assert os.waitpid(first, 0)[1] == 0
    """
    lines = run_python(program, tmp_path).stdout.splitlines()
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert lines[0].endswith(" 1257 False")  # nothing here imports TensorFlow
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checksums", "digits", "labels"]


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with raises(DataError, "runtime.cache_dir", tmp_path / "cache", "set a writable folder", "Not a directory"):
        open_logged(tmp_path / "cache", source="digits")


def test_a_folder_is_split_by_fraction_in_every_class(tmp_path: Path) -> None:
    root = fill_folder(tmp_path / "pets", {"cat": 50, "dog": 20})
    dataset = open_folder(tmp_path, root, test_fraction=0.1)
    assert dataset.name == "pets"
    assert [np.bincount(dataset.splits[n].labels).tolist() for n in SPLITS] == [[35, 14], [10, 4], [5, 2]]
    files = [set(split.files) for split in dataset.splits.values()]
    assert len(set.union(*files)) == sum(map(len, files)) == 70
    for split in dataset.splits.values():
        assert [("cat", "dog").index(Path(file).parent.name) for file in split.files] == split.labels.tolist()
    assert 2 < dataset.splits["train"].labels[:25].sum() < 12  # the classes are mixed from the start
    again = open_folder(tmp_path, root, test_fraction=0.1)
    assert [split.files for split in again.splits.values()] == [split.files for split in dataset.splits.values()]
    other = open_folder(tmp_path, root, test_fraction=0.1, split_seed=7)
    assert set(other.splits["test"].files) != set(dataset.splits["test"].files)
    (root / "cat" / "new.jpg").write_bytes(encode_noise(1000))
    grown = open_folder(tmp_path, root, test_fraction=0.1).splits["validation"].files
    assert len(set(dataset.splits["validation"].files) - set(grown)) <= 1


def test_image_files_are_selected_by_name(tmp_path: Path) -> None:
    root = fill_folder(tmp_path / "pets", {"cat": 5, "dog": 5})
    (root / "cat" / "deep" / "er").mkdir(parents=True)
    (root / "cat" / "deep" / "er" / "A.JPEG").write_bytes(encode_noise(100))
    for number, (name, kind) in enumerate({"b.Png": "PNG", "c.bmp": "BMP", "d.gif": "GIF"}.items()):
        (root / "dog" / name).write_bytes(encode_noise(101 + number, kind))
    for number, (name, kind) in enumerate({"e.webp": "WEBP", "f.jfif": "JPEG"}.items()):
        (root / "dog" / name).write_bytes(encode_noise(110 + number, kind))
    for name in (".hidden.jpg", "g.heic", "h.heic", "i.tif", "notes", "Thumbs.db"):
        (root / "dog" / name).write_bytes(b"no")
    for system in ("lost+found", "__MACOSX", "dog/@eaDir"):
        (root / system).mkdir()
        (root / system / "SYNOPHOTO_THUMB.jpg").write_bytes(encode_noise(1))
    (root / ".git").mkdir()
    (root / "cat" / "back").symlink_to(root / "cat")  # a circle ends
    dataset = open_folder(tmp_path, root)
    names = sorted(Path(file).name for split in dataset.splits.values() for file in split.files)
    assert [name for name in names if "0" not in name] == ["A.JPEG", "b.Png", "c.bmp", "d.gif", "e.webp", "f.jfif"]
    assert dataset.class_names == ("cat", "dog")
    known = "jpg/jpeg/jpe/jfif/png/bmp/gif/webp"
    assert f"files without a {known} extension: 2 .heic, 1 without extension, 1 .tif ignored" in dataset.notes
    assert "python -m trainer.prepare converts the 1 .tif/.tiff files to PNG" in dataset.notes
    (left_out,) = [note for note in dataset.notes if note.startswith("left out as of the system or hidden: ")]
    for name in ("1 lost+found", "1 __MACOSX", "1 @eaDir", "2 hidden", "1 Thumbs.db"):
        assert name in left_out


@pytest.mark.parametrize(
    ("classes_in", "loose_in"),
    [(("",), ""), (("train", "test"), ""), (("train", "test"), "train"), (("train",), "train")],
)
def test_files_next_to_the_class_folders_are_noted(tmp_path: Path, classes_in: tuple[str, ...], loose_in: str) -> None:
    root = tmp_path / "pets"
    for i, split in enumerate(classes_in):
        fill_folder(root / split, {"cat": 5, "dog": 5}, start=10 * i)
    assert not any("directly in" in note for note in open_folder(tmp_path, root).notes)
    for name in ("a.JPG", "b.jpg", "labels.csv", ".hidden.jpg", "Thumbs.db"):
        (root / loose_in / name).write_bytes(encode_noise(1))
    where = root / loose_in
    assert f"2 .jpg, 1 .csv ignored: directly in {where}, not in a class folder" in open_folder(tmp_path, root).notes


@pytest.mark.parametrize("validation", ["validation", "val", "valid"])
def test_split_folders_are_the_splits(tmp_path: Path, validation: str) -> None:
    for start, (name, count) in enumerate({"train": 10, validation: 4, "test": 3}.items()):
        fill_folder(tmp_path / "pets" / name, {"cat": count, "dog": count}, 100 * start)
    dataset = open_folder(tmp_path, tmp_path / "pets", test_fraction=0.5)
    assert count_classes(dataset) == {"train": 20, "validation": 8, "test": 6}
    assert {Path(f).parts[-3] for f in dataset.splits["validation"].files} == {validation}
    shutil.rmtree(tmp_path / "pets" / validation)  # then a fraction of train validates
    assert count_classes(open_folder(tmp_path, tmp_path / "pets")) == {"train": 16, "validation": 4, "test": 6}


def test_a_fraction_is_the_split_that_has_no_folder_and_one_that_is_not_used_is_noted(tmp_path: Path) -> None:
    for start, (name, count) in enumerate({"train": 10, "validation": 4}.items()):
        fill_folder(tmp_path / "pets" / name, {"cat": count, "dog": count}, 100 * start)
    dataset = open_folder(tmp_path, tmp_path / "pets", validation_fraction=0.3, test_fraction=0.2)
    assert count_classes(dataset) == {"train": 16, "validation": 8, "test": 4}
    assert "data.validation_fraction=0.3 is not used: the data has a validation split" in dataset.notes
    assert not [note for note in open_folder(tmp_path, tmp_path / "pets").notes if "not used" in note]
    records = str(write_records(tmp_path / "set", {"train": [0, 1, 2, 2] * 5, "test": [0, 1, 2]}))
    dataset = open_logged(tmp_path, source="tfds", root=records, test_fraction=0.3)
    assert "data.test_fraction=0.3 is not used: the data has a test split" in dataset.notes


def test_the_fingerprint_follows_the_content_and_not_the_path(tmp_path: Path) -> None:
    root = fill_folder(tmp_path / "pets", {"cat": 10, "dog": 10})
    shutil.copytree(root, tmp_path / "elsewhere" / "animals")
    first = open_folder(tmp_path, root).fingerprint
    assert first == open_folder(tmp_path, tmp_path / "elsewhere" / "animals").fingerprint
    assert len(first) == 16
    others = {
        first,
        *(open_folder(tmp_path, root, **{key: 3}).fingerprint for key in ("split_seed", "labels_per_class")),
    }
    (root / "cat" / "00.jpg").write_bytes(encode_noise(500))
    others.add(open_folder(tmp_path, root).fingerprint)
    (root / "cat").rename(root / "lion")
    others.add(open_folder(tmp_path, root).fingerprint)
    assert len(others) == 5


LAYOUTS = {
    "missing": (None, f"No such file or directory: .*pets .working directory {os.getcwd()}", SUPPORTED_LAYOUT_FIX),
    "empty": ("", "has 0 images and no class folders", SUPPORTED_LAYOUT_FIX),
    "other files": ("a.txt", "has 0 images and no class folders", SUPPORTED_LAYOUT_FIX),
    "no classes": ("a.jpg", "has 1 image and no class folders", SUPPORTED_LAYOUT_FIX),
    "no images": ("cat/ dog/", r"has no images in its class folders \(cat, dog\)", SUPPORTED_LAYOUT_FIX),
    "one class": ("cat/0.jpg", r"has only one class folder \(cat\)", SUPPORTED_LAYOUT_FIX),
    "nested": ("all/cat/0.jpg all/dog/0.jpg", r"only one class folder \(all\)", "set data.root={root}/all"),
    "no train": ("val/cat/0.jpg val/dog/0.jpg", "has val but no train folder", SUPPORTED_LAYOUT_FIX),
    "other classes": (
        "train/cat/0.jpg train/owl/0.jpg val/cat/0.jpg val/dog/0.jpg",
        "only {root}/train has owl, and only {root}/val has dog",
        "use the same class folders",
    ),
    "two": ("train/cat/0.jpg validation/cat/0.jpg val/cat/0.jpg", "are both the validation split", "remove one"),
    "mixed": (
        "train/cat/0.jpg train/dog/0.jpg extra/0.jpg",
        r"split folders \(train\) and others \(extra\)",
        SUPPORTED_LAYOUT_FIX,
    ),
}


@pytest.mark.parametrize(("paths", "problem", "fix"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_other_layouts_are_rejected(tmp_path: Path, paths: str | None, problem: str, fix: str) -> None:
    root = tmp_path / "pets"
    if paths is not None:
        root.mkdir()
    for path in (paths or "").split():
        target = root / path
        (target if path.endswith("/") else target.parent).mkdir(parents=True, exist_ok=True)
        if not path.endswith("/"):
            target.write_bytes(encode_noise(len(path)))
    problem, fix = problem.replace("{root}", str(root)), fix.replace("{root}", str(root))
    with raises(DataError, "data.root", str(root), re.escape(fix), problem):
        open_folder(tmp_path, root)


def test_an_unreadable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "file").write_text("")
    for name, problem in (("circle", "Too many levels of symbolic links"), ("file", "Not a directory")):
        with raises(DataError, "data.root", f"{tmp_path}/{name}", problem=f"{problem}: {tmp_path}/{name} "):
            open_folder(tmp_path, tmp_path / name)


def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    root = fill_folder(tmp_path / "pets", {"cat": 3, "dog": 3})
    root.chmod(0)
    before = os.geteuid()
    try:
        if before == 0:  # root may read everything
            os.seteuid(65534)
        with raises(DataError, "data.root", str(root), problem=f"Permission denied: {root} "):
            open_folder(tmp_path, root)
    finally:
        os.seteuid(before)
        root.chmod(0o700)


def test_a_folder_cannot_be_two_splits(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    fill_folder(root / "train", {"cat": 5, "owl": 5})
    (root / "validation").symlink_to(root / "train")
    with raises(DataError, "data.root", str(root), "a separate folder", f"are the same folder .{root}/train."):
        open_folder(tmp_path, root)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert open_folder(tmp_path, fill_folder(tmp_path / "a", {"train": 4, "car": 4})).class_names == ("car", "train")


def test_files_that_are_no_images_fail_or_are_skipped(tmp_path: Path) -> None:
    root = fill_folder(tmp_path / "pets", {"cat": 8, "dog": 8})
    (root / "cat" / "01.jpg").write_bytes(b"")
    (root / "dog" / "02.jpg").write_bytes(b"<html>not found</html>")
    (root / "dog" / "03.jpg").write_bytes(b"II*\0" + bytes(100))
    reasons = [
        f"{root}/cat/01.jpg: is empty",
        f"{root}/dog/02.jpg: does not begin like a JPEG, PNG, BMP, GIF or WebP",
        f"{root}/dog/03.jpg: is a TIFF: name it .tif, and convert it with python -m trainer.prepare",
    ]
    with raises(DataError, fix="data.on_error=skip", problem="3 of 16 files are not readable JPEG.*") as caught:
        open_folder(tmp_path, root)
    assert caught.value.problem.split("\n  ")[1:] == reasons
    for number in (4, 5, 6):
        (root / "dog" / f"0{number}.jpg").write_bytes(b"")
    with raises(DataError, fix="data.on_error=skip", problem="(?s)6 of 16 files .*\n  and 1 more") as caught:
        open_folder(tmp_path, root)
    for number in (4, 5, 6):
        (root / "dog" / f"0{number}.jpg").write_bytes(b"\xff\xd8\xff")
    dataset = open_folder(tmp_path, root, on_error="skip")
    assert list(dataset.skipped) == reasons
    assert sum(count_classes(dataset).values()) == 13
    assert f"3 skipped (data.on_error=skip), the first: {reasons[0]}" in dataset.notes


def test_a_class_of_other_files_is_named_with_them(tmp_path: Path) -> None:
    root = fill_folder(tmp_path / "pets", {"cat": 5})
    (root / "dog").mkdir()
    for number in range(6):
        (root / "dog" / f"{number}.heic").write_bytes(b"no")
    with raises(DataError, problem="no training example of dog; dog: 6 .heic ignored"):
        open_folder(tmp_path, root)
    shutil.rmtree(root / "cat")
    (root / "cat").mkdir()
    with raises(DataError, "data.root", problem="no images in its class folders .cat, dog, .*6 .heic ignored"):
        open_folder(tmp_path, root)


def test_class_names_of_the_configuration_are_those_of_the_data(tmp_path: Path) -> None:
    tfds = {"source": "tfds", "root": str(write_records(tmp_path / "set", {"train": [0, 1, 2, 2] * 5}))}
    root = fill_folder(tmp_path / "pets", {"cat": 9, "dog": 4, "owl": 4})
    images = {"source": "image_folder", "root": str(root)}
    for data in (tfds, images):
        plain, renumbered = (
            open_logged(tmp_path, **data),
            open_logged(tmp_path, **data, class_names=("owl", "cat", "dog")),
        )
        assert renumbered.class_names == ("owl", "cat", "dog")
        for name, split in plain.splits.items():
            by_name = [[d.class_names[i] for i in d.splits[name].labels] for d in (plain, renumbered)]
            assert by_name[0] == by_name[1], split.name
        assert "the class indices follow the order of data.class_names, not that of the dataset" in renumbered.notes
        assert open_logged(tmp_path, **data, class_names=CLASSES).fingerprint == plain.fingerprint
        for names, problem in (
            (("cat", "dog", "yak"), "only .* has owl, only data.class_names has yak"),
            (("cat", "dog"), "only .* has owl"),
            (("cat", "dog", "owl", "owl"), "a name is repeated"),
        ):
            with raises(DataError, "data.class_names", f"[{','.join(names)}]", "leave it out", problem):
                open_logged(tmp_path, **data, class_names=names)


@pytest.mark.parametrize("classes", [("cat",), ("cat", "dog"), CLASSES, (*CLASSES, "yak")])
def test_an_evaluation_reads_other_classes_than_those_of_data_class_names(
    classes: tuple[str, ...], tmp_path: Path
) -> None:
    root = fill_folder(tmp_path / "pets", dict.fromkeys(classes, 3))
    options = {"class_names": ("owl", "cat", "dog"), "purpose": "evaluate", "validation_fraction": 0.0}
    assert set(open_folder(tmp_path, root, **options).class_names) == set(classes)


def test_labels_per_class_selects_that_many_by_seed(tmp_path: Path) -> None:
    root = fill_folder(tmp_path / "pets", {"cat": 20, "dog": 20, "owl": 3})
    notes: list[str] = []
    few, whole = open_folder(tmp_path, root, labels_per_class=5, notes=notes), open_folder(tmp_path, root)
    train = few.splits["train"]
    assert np.bincount(train.labels).tolist() == [5, 5, 2]
    assert set(train.files) < set(whole.splits["train"].files)
    assert few.splits["validation"].files == whole.splits["validation"].files
    assert open_folder(tmp_path, root, labels_per_class=5).splits["train"].files == train.files
    assert open_folder(tmp_path, root, labels_per_class=5, seed=2).splits["train"].files != train.files
    assert "data.labels_per_class=5: fewer examples exist of owl" in notes


def test_max_examples_mixes_the_classes(tmp_path: Path) -> None:
    dataset = open_folder(tmp_path, fill_folder(tmp_path / "pets", {"cat": 40, "dog": 40, "owl": 10}), max_examples=6)
    for name in ("train", "validation"):
        assert np.bincount(dataset.splits[name].labels).tolist() == [2, 2, 2]


def test_limits_on_records_select_the_right_records() -> None:
    labels = np.random.default_rng(0).integers(0, 3, 30).astype(np.int32)
    split = Split("train", labels[2:28], shards=(Shard("a", 15, 2, 15), Shard("b", 15, 0, 13)))
    for limited in (select_per_class(split, 2, 1), select_at_most(split, 7, 1), select_examples(split, np.arange(26))):
        numbers = [s.start + k + 15 * (s.path == "b") for s in limited.shards for k in range(s.stop - s.start)]
        assert labels[numbers].tolist() == limited.labels.tolist()
        assert numbers == sorted(set(numbers))
        assert [limited.name_of(i) for i in range(limited.count)] == [f"{'ab'[n // 15]}#{n % 15}" for n in numbers]
    assert np.bincount(select_per_class(split, 2, 1).labels).tolist() == [2, 2, 2]
    assert select_examples(split, np.arange(26)).shards == split.shards
    assert select_examples(split, np.zeros(0, int)).shards == ()


def test_split_sizes_leave_something_to_train_on() -> None:
    fractions = {"validation": 0.2, "test": 0.1}
    sizes = {n: tuple(compute_split_sizes(n, fractions).values()) for n in (1, 2, 3, 10, 100)}
    assert sizes == {1: (0, 0), 2: (1, 0), 3: (1, 1), 10: (2, 1), 100: (20, 10)}
    assert compute_split_sizes(10, {"validation": 0.0}) == {"validation": 0}


def test_imbalance_tiny_splits_and_copies_are_noted(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    notes: list[str] = []
    fill_folder(root / "train", {"cat": 20, "dog": 5, "owl": 6})
    fill_folder(root / "validation", {"cat": 2, "dog": 2, "owl": 1}, 100)
    (root / "validation" / "owl" / "00.jpg").unlink()
    shutil.copy(root / "train" / "cat" / "03.jpg", root / "validation" / "cat" / "00.jpg")
    dataset = open_folder(tmp_path, root, notes=notes)
    assert notes.pop().startswith("data fingerprint: ")
    assert list(dataset.notes) == notes
    patterns = (
        r"differ 4.0-fold \(dog 5, owl 6, cat 20\): training.class_weights=balanced",
        "validation has only 4 examples: each is 25.0 points of accuracy",
        "validation has no example of owl",
        f"1 of the 4 files of validation .*: {root}/validation/cat/00.jpg = {root}/train/cat/03.jpg",
    )
    for pattern, line in zip(patterns, notes, strict=True):
        assert re.search(pattern, line)


def test_a_tfds_folder_gives_its_splits(tmp_path: Path) -> None:
    labels = {"train": [0, 1, 2] * 10, "validation": [0, 1, 2] * 2, "test": [2, 1, 0]}
    dataset = open_logged(tmp_path, source="tfds", root=str(write_records(tmp_path / "pets", labels, shards=3)))
    assert dataset.class_names == CLASSES
    assert {name: split.labels.tolist() for name, split in dataset.splits.items()} == labels
    assert read_encoded_images(dataset.splits["test"]) == [encode_noise(36), encode_noise(37), encode_noise(38)]
    assert [(s.count, s.start, s.stop) for s in dataset.splits["train"].shards] == [(10, 0, 10)] * 3


RANGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {
            "train_split": "train[:50%]+train[90%:]",
            "validation_split": "train[50%:70%]",
            "test_split": "train[70%:90%]",
        },
        {"train": [*range(15), 27, 28, 29], "validation": range(15, 21), "test": range(21, 27)},
    ),
    (  # the tail of train where that is a fair sample
        {"validation_fraction": 0.2, "test_fraction": 0.1},
        {"train": range(21), "validation": range(21, 27), "test": range(27, 30)},
    ),
]


@pytest.mark.parametrize(("data", "expected"), RANGES)
def test_splits_are_ranges_of_records(tmp_path: Path, data: dict[str, str], expected: dict[str, Any]) -> None:
    root = str(write_records(tmp_path / "pets", {"train": [0, 1, 2] * 10}, shards=3))
    dataset = open_logged(tmp_path, source="tfds", root=root, **data)
    expected = {name: [encode_noise(k) for k in numbers] for name, numbers in expected.items()}
    assert {name: read_encoded_images(split) for name, split in dataset.splits.items()} == expected


def test_validation_is_drawn_if_train_is_sorted_by_class(tmp_path: Path) -> None:
    root = str(write_records(tmp_path / "pets", {"train": [0] * 20 + [1] * 20 + [2] * 20}))
    notes: list[str] = []
    dataset = open_logged(tmp_path, source="tfds", root=root, notes=notes)
    assert np.bincount(dataset.splits["validation"].labels).tolist() == [4, 4, 4]
    assert np.bincount(dataset.splits["train"].labels).tolist() == [16, 16, 16]
    both = read_encoded_images(dataset.splits["train"]) + read_encoded_images(dataset.splits["validation"])
    assert sorted(both) == sorted(encode_noise(k) for k in range(60))
    assert [n for n in notes if "validation was drawn record by record with data.split_seed=42; shards written by" in n]


def test_labels_are_read_once(tmp_path: Path) -> None:
    root = str(write_records(tmp_path / "pets", {"train": [0, 1, 2] * 10}, shards=3))
    notes: list[str] = []
    first = open_logged(tmp_path, source="tfds", root=root, notes=notes)
    assert f"reading the labels of 3 shards (once, cached in {tmp_path}/labels)" in notes
    (first_labels, *_) = sorted((tmp_path / "labels").iterdir())
    damaged = bytearray(first_labels.read_bytes())
    damaged[damaged.index(b"}") + 80] ^= 1  # in the array, after its header
    first_labels.write_bytes(damaged)
    damaged_again = open_logged(tmp_path, source="tfds", root=root)
    assert damaged_again.splits["train"].labels.tolist() == first.splits["train"].labels.tolist()
    notes.clear()
    second = open_logged(tmp_path, source="tfds", root=root, notes=notes)
    assert not [line for line in notes if "reading the labels" in line]
    assert second.fingerprint == first.fingerprint
    assert second.splits["train"].labels.tolist() == first.splits["train"].labels.tolist()
    shutil.copytree(root, tmp_path / "elsewhere")
    assert open_logged(tmp_path, source="tfds", root=str(tmp_path / "elsewhere")).fingerprint == first.fingerprint


def test_overlapping_splits_are_rejected_or_noted(tmp_path: Path) -> None:
    root = write_records(tmp_path / "pets", {"train": [0, 1, 2] * 10, "test": [0, 1, 2]})
    data, problem = {"source": "tfds", "root": str(root)}, "6 examples in common with data.train_split=train"
    with raises(DataError, "data.validation_split", "train[80%:]", problem=problem):
        open_logged(tmp_path, **data, validation_split="train[80%:]")
    notes = open_logged(tmp_path, **data, validation_split="test").notes
    assert "validation and test have 3 examples in common: the checkpoint is selected on test examples" in notes


UNUSED: list[tuple[dict[str, str], dict[str, Any], str]] = [
    ({"train_split": "train+test"}, {"validation": 6, "test": 0}, "6 of the 6 examples of test are in .* not the test"),
    ({"train_split": "test"}, {"validation": 1, "test": 0}, "6 of the 6 examples of test are in data.train_split=test"),
    ({"train_split": "train+test[:3]"}, {"validation": 5, "test": 3}, "3 of the 6 .*: the others are the test split"),
]


@pytest.mark.parametrize(("data", "expected", "note"), UNUSED)
def test_a_split_that_is_trained_on_is_not_scored(
    tmp_path: Path, data: dict[str, str], expected: dict[str, int], note: str
) -> None:
    root = write_records(tmp_path / "pets", {"train": [0, 1, 2] * 8, "test": [0, 1, 2] * 2}, shards=2)
    for explicit in ({}, {"test_split": None}):
        notes: list[str] = []
        dataset = open_logged(tmp_path, notes, source="tfds", root=str(root), **data, **explicit)
        assert {name: count_classes(dataset).get(name, 0) for name in expected} == expected
        assert [line for line in notes if re.search(note, line)], notes
        every = [image for split in dataset.splits.values() for image in read_encoded_images(split)]
        assert len(every) == len(set(every))
    with raises(DataError, "data.test_split", "test", "without training examples", "examples in common"):
        open_logged(tmp_path, source="tfds", root=str(root), **data, test_split="test")


@pytest.mark.parametrize("name", ["validation", "test"])
def test_a_split_that_is_not_labelled_is_left_out(tmp_path: Path, name: str) -> None:
    """TFDS gives the label -1 to examples whose labels are not published."""
    root = write_records(tmp_path / "pets", {"train": [0, 1, 2] * 8, name: [-1] * 6}, shards=2)
    data = {"source": "tfds", "root": str(root), "validation_fraction": 0.25}
    notes: list[str] = []
    assert count_classes(open_logged(tmp_path, notes, **data)) == {"train": 18, "validation": 6}
    assert f"the split {name} of the dataset is not used: its examples have no label (-1)" in notes
    fix = "leave its split out .*data.test_split=none"
    for on_error in ("fail", "skip"):
        with raises(DataError, "data.label_field", "label", fix, r"record 0 of shard .* is not labelled \(-1\)"):
            open_logged(tmp_path, **data, **{f"{name}_split": name}, on_error=on_error)


@pytest.mark.parametrize("name", ["train", "validation"])
def test_a_record_without_a_label_among_others_is_skipped(tmp_path: Path, name: str) -> None:
    labels = {"train": [0, 1, 2] * 8, "validation": [0, 1, 2] * 2}
    labels[name][4] = -1
    root = write_records(tmp_path / "pets", labels)
    data = {"source": "tfds", "root": str(root)}
    with raises(DataError, "data.label_field", "label", "data.on_error=skip", "record 4 of shard .* is not labelled"):
        open_logged(tmp_path, **data)
    notes: list[str] = []
    dataset = open_logged(tmp_path, notes, **data, on_error="skip")
    assert count_classes(dataset) == {"train": 24, "validation": 6} | {name: len(labels[name]) - 1}
    assert (dataset.splits[name].labels >= 0).all()
    assert len(dataset.skipped) == 1
    assert re.fullmatch(r"record 4 of shard .* is not labelled \(-1\)", dataset.skipped[0])
    assert any(note.startswith("1 skipped (data.on_error=skip), the first: record 4") for note in notes)


@pytest.mark.parametrize("name", ["validation", "test"])
def test_a_split_of_the_dataset_can_be_left_out(tmp_path: Path, name: str) -> None:
    root = write_records(tmp_path / "pets", {"train": [0, 1, 2] * 8, name: [0, -1, 1]}, shards=2)
    data = {"source": "tfds", "root": str(root), "validation_fraction": 0.25}
    with raises(DataError, "data.label_field", "label", problem="record 1 of shard .* is not labelled"):
        open_logged(tmp_path, **data)
    assert count_classes(open_logged(tmp_path, **data, **{f"{name}_split": "none"})) == {"train": 18, "validation": 6}


def test_a_dataset_of_one_split_is_trained_on(tmp_path: Path) -> None:
    root = write_records(tmp_path / "pets", {"test": [0, 1, 2] * 10})
    data = {"source": "tfds", "root": str(root), "train_split": "test"}
    assert count_classes(open_logged(tmp_path, **data)) == {"train": 24, "validation": 6}
    assert count_classes(open_logged(tmp_path, **data, test_fraction=0.1)) == {"train": 21, "validation": 6, "test": 3}


def test_missing_tfds_datasets_are_named(tmp_path: Path) -> None:
    def rejected(key: str, value: str, fix: str, problem: str) -> None:
        with raises(DataError, f"data.{key}", value, fix, problem):
            open_logged(tmp_path, source="tfds", **{key: value}, data_dir=str(tmp_path))

    gone = f"{tmp_path}/gone"
    rejected("root", gone, "write one with python -m trainer.prepare", "has no prepared dataset")
    write_records(tmp_path / "gone" / "1.0.0", {"train": [0, 1, 2]})
    rejected("root", gone, f"set data.root={gone}/1.0.0$", "has no prepared dataset")
    rejected("name", "beans", "set data.download=true .*, or data.data_dir", f"is not prepared in {tmp_path}$")
    rejected("name", "tf_flower", "set data.name=tf_flowers", f"no dataset .* and none is prepared in {tmp_path}$")
    (write_records(tmp_path / "bad", {"train": [0, 1, 2]}) / "dataset_info.json").write_text("{")
    rejected("root", f"{tmp_path}/bad", "prepare the dataset again", "TFDS cannot read this folder")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (requests.ConnectionError("Name or service not known"), Interrupted),
        (requests.Timeout("read timed out"), Interrupted),
        (AssertionError("the checksum differs"), DataError),
    ],
)
def test_only_a_download_that_the_network_ends_can_be_retried(
    error: Exception, kind: type[TrainerError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorflow_datasets as tfds

    def download_and_prepare(*_: object, **__: object) -> None:
        try:
            raise error
        except type(error) as cause:
            raise RuntimeError("extraction failed") from cause

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", download_and_prepare)
    with raises(kind, "data.name", "beans", problem="cannot download", fix="on another machine"):
        open_logged(tmp_path, source="tfds", name="beans", data_dir=str(tmp_path), download=True)


def test_a_full_disk_is_no_failed_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow_datasets as tfds

    def download_and_prepare(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", download_and_prepare)
    with raises(Interrupted, problem=rf"^{tmp_path}: cannot be written to \(No space", fix="make space"):
        open_logged(tmp_path, source="tfds", name="beans", data_dir=str(tmp_path), download=True)


def test_a_prepared_dataset_is_opened_by_name(tmp_path: Path) -> None:
    write_records(tmp_path / "pets" / "1.0.0", {"train": [0, 1, 2] * 5, "test": [0, 1, 2]})
    dataset = open_logged(tmp_path, source="tfds", name="pets", data_dir=str(tmp_path))
    assert count_classes(dataset) == {"train": 12, "validation": 3, "test": 3}


@pytest.mark.parametrize(
    ("key", "value", "fix", "problem"),
    [
        ("train_split", "training", r"train \(30\)", r"pets has no such split \("),
        ("validation_split", "train[:0]", "set a split string", "is empty in pets"),
        ("image_field", "photo", "image_field=image", r"no Image .*it has image \(Image\), label \(ClassLabel\)"),
        ("label_field", "image", "set data.label_field=label", "pets has no ClassLabel of this name"),
    ],
)
def test_wrong_splits_and_fields_are_named(tmp_path: Path, key: str, value: str, fix: str, problem: str) -> None:
    root = write_records(tmp_path / "pets", {"train": [0, 1, 2] * 10})
    with raises(DataError, f"data.{key}", value, fix, problem):
        open_logged(tmp_path, source="tfds", root=str(root), **{key: value})


def test_another_file_format_is_named(tmp_path: Path) -> None:
    root = write_records(tmp_path / "pets", {"train": [0, 1, 2] * 10})
    info = json.loads((root / "dataset_info.json").read_text())
    (root / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "array_record"}))
    with raises(DataError, fix="file_format=tfrecord", problem="pets is stored as array_record"):
        open_logged(tmp_path, source="tfds", root=str(root))


def test_damaged_shards_fail_or_are_skipped(tmp_path: Path) -> None:
    root = write_records(tmp_path / "pets", {"train": [0, 1, 2] * 10}, shards=2)
    first, second = sorted(root.glob("*.tfrecord*"))
    data: dict[str, Any] = {"source": "tfds", "root": str(root)}
    os.truncate(second, second.stat().st_size - 10)
    truncated = f"shard {second} is truncated: it ends inside record 14, 10 bytes early"
    with raises(DataError, fix="write it again, or set data.on_error=skip", problem=truncated):
        open_logged(tmp_path, **data)
    content = bytearray(first.read_bytes())
    content[int(index_shard(first).offsets[3]) + 50] ^= 1
    first.write_bytes(bytes(content))
    damaged = f"record 3 of shard {first} is corrupt (checksum mismatch)"
    with raises(DataError, fix="write it again, or set data.on_error=skip", problem=re.escape(damaged)):
        open_logged(tmp_path, **data)
    dataset = open_logged(tmp_path, **data, on_error="skip", validation_fraction=0)
    assert read_encoded_images(dataset.splits["train"]) == [encode_noise(k) for k in range(29) if k != 3]
    assert list(dataset.skipped) == [damaged, truncated]
    second.unlink()
    with raises(DataError, problem=f"{second} cannot be read: No such file or directory"):
        open_logged(tmp_path, **data, on_error="skip")


def test_a_shard_of_another_length_is_named(tmp_path: Path) -> None:
    root = write_records(tmp_path / "pets", {"train": [0, 1, 2] * 10}, shards=2)
    first, second = sorted(root.glob("*.tfrecord*"))
    first.write_bytes(first.read_bytes() + second.read_bytes())
    with raises(DataError, fix="data.on_error=skip", problem=f"{first} holds 30 records, but .* lists 15"):
        open_logged(tmp_path, source="tfds", root=str(root))


def test_a_pattern_is_split_by_files(tmp_path: Path) -> None:
    write_records(tmp_path / "pets", {"train": [0, 1, 2] * 10}, shards=5)
    data = {"source": "tfrecords", "pattern": f"{tmp_path}/pets/*.tfrecord*", "class_names": CLASSES}
    dataset = open_logged(tmp_path, **data, test_fraction=0.2)
    shards = {name: len(split.shards) for name, split in dataset.splits.items()}
    assert shards == {"train": 3, "validation": 1, "test": 1}
    assert read_encoded_images(dataset.splits["validation"]) == [encode_noise(k) for k in range(6)]
    assert read_encoded_images(dataset.splits["test"]) == [encode_noise(k) for k in range(6, 12)]
    assert dataset.name == "pets"
    one = {**data, "pattern": f"{tmp_path}/pets/*-00000-of*", "validation_fraction": 0}
    assert list(open_logged(tmp_path, **one).splits) == ["train"]


UNNAMED: list[tuple[tuple[str, ...], str | None, str, str]] = [
    (CLASSES[:2], "data.label_field", "class name", r"the label 2 of record 2 .* outside 0\.\.1"),
    (("cat", "cat", "owl"), None, "use each class name once", "pets has duplicate class names: cat"),
    ((*CLASSES, "yak"), None, "remove the class", "no training example of yak"),
]


@pytest.mark.parametrize(("names", "key", "fix", "problem"), UNNAMED)
def test_wrong_names_of_records_without_names_are_named(
    tmp_path: Path, names: tuple[str, ...], key: str | None, fix: str, problem: str
) -> None:
    root = write_records(tmp_path / "pets", {"train": [0, 1, 2] * 10}, shards=5)
    (root / "label.labels.txt").unlink()
    with raises(DataError, key, ANY, fix, problem):
        open_logged(tmp_path, source="tfrecords", pattern=f"{root}/*.tfrecord*", class_names=names)


def test_labels_that_begin_with_1_are_suspected_where_0_is_absent(tmp_path: Path) -> None:
    root = write_records(tmp_path / "pets", {"train": [1, 2] * 10}, shards=5)
    (root / "label.labels.txt").unlink()
    with raises(DataError, fix="if labels begin with 1, set data.label_kind=index1", problem="no training .* of cat"):
        open_logged(tmp_path, source="tfrecords", pattern=f"{root}/*.tfrecord*", class_names=CLASSES)


@pytest.mark.parametrize(
    ("shape", "fix"), [((), r"data.label_kind=index \(index1 if"), ((3,), "data.label_kind=onehot to read")]
)
def test_numbers_of_tfds_that_are_no_class_label_can_be_read(tmp_path: Path, shape: tuple[int, ...], fix: str) -> None:
    import tensorflow_datasets as tfds

    root = write_records(tmp_path / "pets", {"train": [0, 1, 2] * 5})
    feature = tfds.features.Tensor(shape=shape, dtype=np.int64) if shape else tfds.features.Scalar(np.int64)
    tfds.features.FeaturesDict({"image": tfds.features.Image(), "label": feature}).save_config(str(root))
    with raises(DataError, "data.label_field", "label", f"set data.class_names, and {fix}"):
        open_logged(tmp_path, source="tfds", root=str(root))


def test_records_next_to_class_names_have_the_labels_of_these(tmp_path: Path) -> None:
    root = write_records(tmp_path / "pets", {"train": [0, 1, 2] * 10}, shards=5)
    data = {"source": "tfrecords", "pattern": f"{root}/*.tfrecord*"}
    order = ("owl", "cat", "dog")
    split = open_logged(tmp_path, **data, class_names=order).splits["validation"]
    assert [order[label] for label in split.labels] == [*CLASSES, *CLASSES]
    (root / "label.labels.txt").unlink()
    assert open_logged(tmp_path, **data, class_names=order).splits["validation"].labels.tolist() == [0, 1, 2] * 2
    write_records(tmp_path / "more", {"train": [0, 1, 2] * 10}, shards=5)
    (root / "label.labels.txt").write_text("dog\ncat\nowl\n")
    with raises(DataError, "data.pattern", fix="of one of them", problem="numbered differently: .* has dog, cat, owl"):
        open_logged(tmp_path, source="tfrecords", pattern=f"{tmp_path}/*/*.tfrecord*", class_names=CLASSES)


FIRST = "{root}/pets-train.tfrecord-00000-of-00005"
WRONG_PATTERNS: list[tuple[dict[str, Any], str | None, str, str]] = [
    ({"pattern": FIRST}, "data.pattern", "set data.validation_fraction=0$", "1 file, too few .* train, validation"),
    ({"pattern": "{root}/*.rec"}, "data.pattern", "", f"no file matches .searched from {os.getcwd()}"),
    ({"label_field": "class"}, "data.label_field", "image .bytes., label .int64.", f"0 of shard {FIRST} has no such"),
    ({"class_names": CLASSES[:2]}, "data.class_names", "exactly", "the 3 classes of the data: only pets has owl"),
    ({"class_names": ("cat", "cat", "owl")}, "data.class_names", "exactly", "only pets has dog"),
    ({"class_names": (*CLASSES, "yak")}, "data.class_names", "exactly", "only data.class_names has yak"),
]


@pytest.mark.parametrize(("change", "key", "fix", "problem"), WRONG_PATTERNS)
def test_wrong_patterns_are_named(
    tmp_path: Path, change: dict[str, Any], key: str | None, fix: str, problem: str
) -> None:
    root = write_records(tmp_path / "pets", {"train": [0, 1, 2] * 10}, shards=5)
    data = {"pattern": "{root}/*.tfrecord*", "class_names": CLASSES, **change}
    data["pattern"] = data["pattern"].replace("{root}", str(root))
    value = change.get(key.removeprefix("data."), ANY) if key and key != "data.class_names" else ANY
    value = value.replace("{root}", str(root)) if isinstance(value, str) else value
    with raises(DataError, key, value, fix, problem.replace("{root}", str(root))):
        open_logged(tmp_path, source="tfrecords", **data)


def test_overfitting_trains_on_one_batch_and_scores_it(tmp_path: Path) -> None:
    fill_folder(tmp_path / "photos", dict.fromkeys(CLASSES, 10))
    config = validate_config({
        "data": {"source": "image_folder", "root": str(tmp_path / "photos"), "test_fraction": 0.2},
        "model": {"backbone": "MobileNetV2"}, "phases": {"head": {"thaw": "none", "epochs": 1}},
        "training": {"batch_size": 6}, "debug": {"overfit": True}, "runtime": {"cache_dir": str(tmp_path / "cache")},
    })  # fmt: skip
    dataset = open_run_dataset(config, config.data, lambda _: None)
    train = dataset.splits["train"]
    files = {name: split.files for name, split in dataset.splits.items()}
    assert files == dict.fromkeys(("train", "validation"), train.files)
    assert train.count == 6
    require_validation(dataset, 0.2)


def test_a_run_needs_a_validation_split() -> None:
    train = Split("train", np.zeros(3, np.int32), files=("a", "b", "c"))
    with raises(DataError, "data.validation_fraction", None, "data.validation_split"):
        require_validation(Dataset("x", ("a", "b"), {"train": train}, ""), 0)


@pytest.mark.parametrize("split", ["", "train"])
def test_a_root_that_is_one_folder_too_high_is_noticed(split: str, tmp_path: Path) -> None:
    for name in ("spring", "autumn"):
        fill_folder(tmp_path / "root" / split / name, {"oak": 4, "elm": 4})
    notes = open_folder(tmp_path / "cache", tmp_path / "root").notes
    assert any(
        "elm, oak below" in note and f"data.root={tmp_path / 'root' / split / 'autumn'}" in note for note in notes
    )
    fill_folder(tmp_path / "root" / split, {"spring": 1})  # an image of its own
    assert not any("two folders" in note for note in open_folder(tmp_path / "cache", tmp_path / "root").notes)


@pytest.mark.parametrize("splits", [("",), ("train", "val")])
def test_each_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, splits: tuple[str, ...]) -> None:
    """On a network disk each listing takes a while."""
    for start, name in enumerate(splits):
        fill_folder(tmp_path / "pets" / name, {"cat": 3, "dog": 3}, 10 * start)
    listed: Counter[str] = Counter()

    def count_and_list(original: Callable[[Any], Any], path: Any) -> Any:
        listed[os.fspath(path)] += 1
        return original(path)

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, partial(count_and_list, getattr(os, name)))
    open_folder(tmp_path, tmp_path / "pets")
    below = {path: count for path, count in listed.items() if path.startswith(f"{tmp_path}/pets")}
    assert set(below.values()) == {1}, below
    assert len(below) == (3 if splits == ("",) else 7)
