"""data=csv: image files that a CSV file lists, with their labels, splits and groups."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.data.images import encode_noise, fill_folder
from tests.data.test_open import count_classes, open_folder, open_logged
from tests.errors import raises
from trainer.cli.source import choose_source, detect_source
from trainer.config.schema import validate_config
from trainer.data.prepare import prepare
from trainer.data.records import read_source_names
from trainer.errors import DataError
from trainer.types import Dataset


def write_table(root: Path, content: str | bytes, name: str = "labels.csv") -> Path:
    root.mkdir(exist_ok=True)
    (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root / name


def open_listed(cache: Path, file: Path, **data: Any) -> Dataset:
    return open_logged(cache, source="csv", root=str(file), **data)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return fill_folder(tmp_path / "pets", {"cat": 12, "dog": 12})


def list_folder(root: Path) -> list[str]:
    return [f"{file.relative_to(root)},{file.parent.name}" for file in sorted(root.rglob("*.jpg"))]


def test_the_csv_file_of_a_folder_is_the_same_dataset(tmp_path: Path, pets: Path) -> None:
    by_folder = open_folder(tmp_path, pets, test_fraction=0.2)
    file = write_table(tmp_path / "pets", "\n".join(["file,label", *reversed(list_folder(pets))]))
    by_list = open_listed(tmp_path, file, test_fraction=0.2)
    assert by_list.fingerprint == by_folder.fingerprint
    assert by_list.class_names == by_folder.class_names
    for name, split in by_folder.splits.items():
        assert by_list.splits[name].files == split.files
        assert by_list.splits[name].labels.tolist() == split.labels.tolist()
    assert by_list.name == "labels"


def test_rows_have_splits_and_groups(tmp_path: Path, pets: Path) -> None:
    split = ("Train", "train", "val", " test ", "valid", "TEST")
    rows = [f"{row},{split[i % 6]},site {i % 2}" for i, row in enumerate(list_folder(pets))]
    file = write_table(tmp_path / "pets", "\n".join(["File,Label,Split,Site", *rows]))
    dataset = open_listed(tmp_path, file, group_field="site")
    assert count_classes(dataset) == {"train": 8, "validation": 8, "test": 8}
    for part in dataset.splits.values():
        assert part.groups == tuple(f"site {int(Path(path).stem) % 2}" for path in part.files)
    few = open_listed(tmp_path, file, group_field="site", max_examples=3).splits["test"]
    assert few.groups == tuple(f"site {int(Path(path).stem) % 2}" for path in few.files)
    plain = open_listed(tmp_path, file)
    assert plain.splits["test"].groups is None
    assert "columns that are not read: site; data.group_field=COLUMN reports scores by one" in plain.notes
    with raises(DataError, "data.group_field", "ward", "set one of label, site", f"is not a column of {file}"):
        open_listed(tmp_path, file, group_field="ward")


FORMATS = {
    "byte order mark": b"\xef\xbb\xbffile,label\r\n%s",
    "semicolons": b"file;label\n%s",
    "tabs": b"label\tfile\n%s",
    "quotes": b'"file","label"\n%s',
    "quoted semicolons": b'"file";"label"\n%s',
    "blank lines": b"file,label\n\n ,\n%s",
}


@pytest.mark.parametrize("name", FORMATS)
def test_common_kinds_of_csv_are_read(tmp_path: Path, pets: Path, name: str) -> None:
    header = FORMATS[name]
    separator = b";" if b";" in header else b"\t" if b"\t" in header else b","
    cells = [row.encode().split(b",") for row in list_folder(pets)]
    rows = [separator.join(reversed(pair) if name == "tabs" else pair) for pair in cells]
    dataset = open_listed(tmp_path, write_table(tmp_path / "pets", header % b"\n".join(rows)))
    assert count_classes(dataset) == {"train": 20, "validation": 4}
    assert dataset.class_names == ("cat", "dog")


def test_names_may_have_any_character(tmp_path: Path) -> None:
    names = ["a, b.jpg", 'an "x".jpg', "two\nlines.jpg", "<script>.jpg", "ü 日.jpg", " space .jpg", "=1+1.jpg"]
    rows = ["file,label"]
    (tmp_path / "pets").mkdir()
    for number, name in enumerate(names):
        (tmp_path / "pets" / name).write_bytes(encode_noise(number))
        rows.append('"{}","{}"'.format(name.replace('"', '""'), ("x, y", "<b>\n")[number % 2]))
    dataset = open_listed(tmp_path, write_table(tmp_path / "pets", "\n".join(rows)), validation_fraction=0)
    assert {Path(path).name for path in dataset.splits["train"].files} == set(names)
    assert dataset.class_names == (r"<b>\n", "x, y")


def test_paths_may_be_absolute_or_above_the_folder(tmp_path: Path, pets: Path) -> None:
    paths = [str(pets / "cat" / "00.jpg"), "../pets/cat/01.jpg", "../pets/dog/00.jpg", str(pets / "dog" / "01.jpg")]
    rows = [f"{path},{Path(path).parent.name}" for path in paths]
    dataset = open_listed(
        tmp_path, write_table(tmp_path / "lists", "\n".join(["file,label", *rows])), validation_fraction=0
    )
    assert {str(Path(path).resolve()) for path in dataset.splits["train"].files} == {
        str((tmp_path / "lists" / path).resolve()) for path in paths
    }


HEAD = "file,label\ncat/00.jpg,cat\ndog/00.jpg,dog\n"
SPLITS = "file,label,split\ncat/00.jpg,cat,train\ndog/00.jpg,dog,"
FAULTS: dict[str, tuple[str | bytes, str, str]] = {
    "empty": ("", "has no column file and label: its first row has nothing", "begin it with the row file,label"),
    "no header": ("cat/00.jpg,cat\n", "its first row has cat/00.jpg, cat", "begin it with the row file,label"),
    "other columns": ("image,label\n", "has no column file: its first row has image, label", "the row file,label"),
    "a column twice": ("file,label,label\n", "several columns label", "another name"),
    "no rows": ("file,label\n\n", "has no rows below its header", "list the training images"),
    "no label": (HEAD + "cat/01.jpg, \n", "row 4 has no label: cat/01.jpg", "write the name of its class"),
    "no file": (HEAD + " ,cat\n", "row 4 has no file", "write its path"),
    "a short row": (HEAD + "\ncat/01.jpg\n", "row 5 has no label: cat/01.jpg", "write the name"),
    "a long row": (HEAD + "cat/01,1.jpg,cat\n", "row 4 has 3 cells, but the first row has 2", "in quotes"),
    "a file twice": (HEAD + "cat/../dog/00.jpg,cat\n", "row 4 names the file of row 3 again: cat/", "once"),
    "an unknown split": (SPLITS + "holdout\n", "row 3 has an unknown split, holdout", r"train, validation .or val"),
    "an empty split": (SPLITS + " \n", "row 3 has no split", "train, validation"),
    "no training row": (SPLITS.replace("train", "test") + "test\n", "has no row of the split train, only of test", ""),
    "another encoding": (HEAD.encode() + b"k\xe4tzchen.jpg,cat\n", "is not UTF-8 in line 4", "save it as CSV in UTF-8"),
    "UTF-16": (HEAD.encode("utf-16"), "is not UTF-8 in line 1", "UTF-8"),
    "a null character": (HEAD + "a\0b.jpg,cat\n", "has a null character in line 4", "UTF-8"),
    "an open quote": (HEAD + '"cat/01.jpg,cat\n', "is not CSV .unexpected end of data", "close each quote"),
    "a bucket without a name": (HEAD + "gs:///x.jpg,cat\n", "row 4 names gs:///x.jpg, which cannot be a file", "gs://"),
    "a way out of a bucket": (HEAD + "gs://b/../x.jpg,cat\n", r"row 4 names gs://b/../x.jpg.*is \. or \.\.", "gs://"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_invalid_list_is_explained_with_its_row(tmp_path: Path, pets: Path, name: str) -> None:
    content, problem, fix = FAULTS[name]
    file = write_table(pets, content)
    with raises(DataError, "data.root", str(file), fix, problem):
        open_listed(tmp_path, file)


def test_a_list_that_is_not_there_is_named(tmp_path: Path, pets: Path) -> None:
    with raises(DataError, "data.root", str(pets / "x.csv"), "file,label", "does not exist"):
        open_listed(tmp_path, pets / "x.csv")
    with raises(DataError, "data.root", str(pets), "file,label", "is a folder"):
        open_listed(tmp_path, pets)


def test_files_that_are_missing_or_no_images_fail_with_their_row_or_are_skipped(tmp_path: Path, pets: Path) -> None:
    (pets / "cat" / "01.jpg").unlink()
    (pets / "cat" / "02.jpg").write_bytes(b"no image")
    (pets / "cat" / "03.tif").write_bytes(b"II*\0" + bytes(100))
    (pets / "cat" / "03.jpg").unlink()
    (pets / "cat" / "folder").mkdir()
    rows = [*(f"cat/{i:02d}.jpg,cat" for i in range(12) if i != 3), *(f"dog/{i:02d}.jpg,dog" for i in range(12))]
    file = write_table(pets, "\n".join(["file,label", *rows, "cat/03.tif,cat", "cat/folder,cat"]))
    reasons = [
        f"{pets}/cat/01.jpg (row 3): cannot be read (No such file or directory)",
        f"{pets}/cat/02.jpg (row 4): does not begin like a JPEG, PNG, BMP, GIF or WebP",
        f"{pets}/cat/03.tif (row 25): is a TIFF: convert it with python -m trainer.prepare",
        f"{pets}/cat/folder (row 26): cannot be read (Is a directory)",
    ]
    with raises(DataError, fix="data.on_error=skip", problem="4 of 25 files are not readable JPEG") as caught:
        open_listed(tmp_path, file)
    assert caught.value.problem.split("\n  ")[1:] == reasons
    dataset = open_listed(tmp_path, file, on_error="skip")
    assert list(dataset.skipped) == reasons
    assert sum(count_classes(dataset).values()) == 21


def test_too_many_groups_are_rejected(tmp_path: Path) -> None:
    rows = [f"{i}.jpg,{'ab'[i % 2]},patient {i}" for i in range(120)]
    file = write_table(tmp_path / "pets", "\n".join(["file,label,who", *rows]))
    with raises(DataError, "data.group_field", "who", "at most 100", "120 different values in 120 rows"):
        open_listed(tmp_path, file, group_field="who")
    file = write_table(tmp_path / "pets", "file,label,who\na.jpg,a,x\nb.jpg,b,\n")
    with raises(DataError, "data.root", str(file), "unknown", "row 3 has no who"):
        open_listed(tmp_path, file, group_field="who")


def test_a_csv_file_is_chosen_by_its_name(tmp_path: Path) -> None:
    file = write_table(tmp_path / "pets", HEAD, "My Labels.CSV")
    assert detect_source(str(file)).source == "csv"
    assert choose_source([f"data.root={file}"])[0] == ["data=csv", f"data.root={file}"]


def test_prepared_records_have_the_names_and_groups(tmp_path: Path, pets: Path) -> None:
    rows = [f"{row},{'train' if i % 3 else 'test'},{'ns'[i % 2]}" for i, row in enumerate(list_folder(pets))]
    file = write_table(pets, "\n".join(["file,label,split,site", *rows]))
    config = validate_config({
        "data": {"source": "csv", "root": str(file), "group_field": "site"},
        "model": {"backbone": "MobileNetV2"}, "phases": {"head": {"thaw": "none", "epochs": 1}},
        "runtime": {"cache_dir": str(tmp_path / "cache"), "progress": "lines"},
    })  # fmt: skip
    prepare(config, str(tmp_path / "out"))
    shutil.rmtree(pets)
    prepared = open_logged(tmp_path, source="tfds", root=str(tmp_path / "out"), group_field="site")
    assert count_classes(prepared) == {"train": 12, "validation": 4, "test": 8}
    assert sorted(prepared.splits["test"].groups or ()) == ["n"] * 4 + ["s"] * 4
    names = [name for split in prepared.splits.values() for name in read_source_names(split)]
    assert sorted(names) == sorted(row.partition(",")[0] for row in rows)
