"""data.corrections: examples that are excluded or relabelled, in every source."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.images import encode_noise, fill_folder
from tests.data.test_open import CLASSES, count_classes, open_folder, open_logged, write_records
from tests.errors import raises
from trainer.config.diff import list_forbidden_changes
from trainer.config.schema import validate_resolved_config
from trainer.data.records import frame_record, locate_records, read_image, serialize_example
from trainer.data.tfds_writer import LabeledImages, WriteOptions, write_dataset
from trainer.errors import DataError
from trainer.runs.folder import check_same_data
from trainer.types import Dataset


def write_corrections(tmp_path: Path, *rows: tuple[str, str, str], name: str = "corrections.csv") -> str:
    with open(tmp_path / name, "w", newline="") as file:
        csv.writer(file).writerows([("file", "action", "class"), *rows])
    return str(tmp_path / name)


def list_labels_by_file(dataset: Dataset) -> dict[str, tuple[str, str]]:
    """Split and class of each file."""
    return {
        file: (split.name, dataset.class_names[label])
        for split in dataset.splits.values()
        for file, label in zip(split.files, split.labels, strict=True)
    }


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return fill_folder(tmp_path / "pets", {"cat": 20, "dog": 20, "owl": 20})


def test_examples_of_a_folder_are_corrected_in_their_split(tmp_path: Path, pets: Path) -> None:
    plain = open_folder(tmp_path, pets, test_fraction=0.2)
    before = list_labels_by_file(plain)
    train, test = plain.splits["train"].files, plain.splits["test"].files
    relative = str(Path(test[0]).relative_to(pets))
    rows = [(train[0], "relabel", "owl"), (train[1], "Exclude", ""), (relative, "exclude", "dog")]
    file = write_corrections(tmp_path, *rows)
    dataset = open_folder(tmp_path, pets, test_fraction=0.2, corrections=file)
    expected = {name: value for name, value in before.items() if name not in (train[1], test[0])}
    expected[train[0]] = ("train", "owl")
    assert list_labels_by_file(dataset) == expected
    assert f"corrections: 2 excluded, 1 relabelled ({file})" in [note.partition(";")[0] for note in dataset.notes]
    assert dataset.fingerprint != plain.fingerprint
    assert open_folder(tmp_path, pets, test_fraction=0.2).fingerprint == plain.fingerprint


def test_a_list_remains_valid_when_the_data_is_moved(tmp_path: Path, pets: Path) -> None:
    file = write_corrections(
        tmp_path, (str(pets / "cat" / "03.jpg"), "relabel", "dog"), (str(pets / "dog/00.jpg"), "exclude", "")
    )
    before = open_folder(tmp_path, pets, corrections=file)
    shutil.move(pets, tmp_path / "elsewhere")
    after = open_folder(tmp_path, tmp_path / "elsewhere", corrections=file)
    assert after.fingerprint == before.fingerprint


def write_set(root: Path) -> Path:
    """A TFDS folder of 30 records; record k has label k % 3 and the name "photos/k.jpg", those of test also "x.jpg"."""
    splits = {
        "train": [(encode_noise(k), k % 3) for k in range(20)],
        "test": [(encode_noise(20 + k), k % 3) for k in range(10)],
    }
    texts = {"filename": {"train": [f"photos/{k}.jpg" for k in range(20)], "test": ["=a;-b.jpg", *["x.jpg"] * 9]}}
    write_dataset(root, LabeledImages("pets", CLASSES, splits, texts), WriteOptions(shards=2))
    return root


def read_labels_by_image(dataset: Dataset, split: str) -> dict[bytes, int]:
    part = dataset.splits[split]
    images = [read_image(record) for record in locate_records(part)]
    return dict(zip(images, part.labels.tolist(), strict=True))


def test_records_are_corrected_by_their_id_or_the_name_that_they_store(tmp_path: Path) -> None:
    data: dict[str, Any] = {"source": "tfds", "root": str(write_set(tmp_path / "set")), "validation_fraction": 0}
    plain = open_logged(tmp_path, **data)
    record = plain.splits["train"].name_of(3)  # PATH#RECORD
    rows = [
        (f"elsewhere/{Path(record).name}", "exclude", ""),
        ("photos/7.jpg", "relabel", "cat"),
        ("'=a;'-b.jpg", "relabel", "owl"),
    ]
    dataset = open_logged(tmp_path, **data, corrections=write_corrections(tmp_path, *rows))
    train, test = read_labels_by_image(plain, "train"), read_labels_by_image(plain, "test")
    gone = read_image(locate_records(plain.splits["train"])[3])
    expected = {image: label for image, label in train.items() if image != gone} | {encode_noise(7): 0}
    assert (read_labels_by_image(dataset, "train"), read_labels_by_image(dataset, "test")) == (
        expected,
        test | {encode_noise(20): 2},
    )
    with raises(DataError, "data.corrections", fix="the column file", problem="row 2 names 9 examples, x.jpg"):
        open_logged(tmp_path, **data, corrections=write_corrections(tmp_path, ("x.jpg", "exclude", "")))


def test_record_files_and_digits_are_corrected(tmp_path: Path) -> None:
    for number in range(2):
        content = b"".join(frame_record(serialize_example(encode_noise(10 * number + k), k % 2)) for k in range(10))
        (tmp_path / f"{number}.tfrec").write_bytes(content)
    data: dict[str, Any] = {"source": "tfrecords", "pattern": f"{tmp_path}/*.tfrec", "class_names": ("cat", "dog")}
    file = write_corrections(tmp_path, (f"{tmp_path}/1.tfrec#4", "relabel", "dog"), ("0.tfrec#0", "exclude", ""))
    dataset = open_logged(tmp_path, **data, corrections=file)
    assert dataset.splits["train"].labels.tolist() == [0, 1, 0, 1, 1, 1, 0, 1, 0, 1]
    assert dataset.splits["validation"].labels.tolist() == [1, 0, 1, 0, 1, 0, 1, 0, 1]
    plain = open_logged(tmp_path, source="digits")
    name = plain.splits["test"].name_of(5)
    digit = str((plain.splits["test"].labels[5] + 1) % 10)
    dataset = open_logged(tmp_path, source="digits", corrections=write_corrections(tmp_path, (name, "relabel", digit)))
    assert np.flatnonzero(dataset.splits["test"].labels != plain.splits["test"].labels).tolist() == [5]


FAULTS: dict[str, tuple[list[tuple[str, str, str]], str, str]] = {
    "unknown files": (
        [(f"cat/x{i}.jpg", "exclude", "") for i in range(7)] + [("cat/00.jpg", "exclude", "")],
        r"7 of 8 rows name no file or record of pets: cat/x0.jpg .row 2., .*x4.jpg .row 6., and 2 more",
        "data.on_error=skip to omit them",
    ),
    "an unknown class": ([("cat/00.jpg", "relabel", "dgo")], "row 2 relabels cat/00.jpg to an unknown class, dgo", "did you mean dog"),
    "another class": ([("cat/00.jpg", "relabel", "<b>")], "unknown class, <b>", "write one of cat, dog, owl"),
    "a mistyped action": ([("cat/00.jpg", "exlude", "")], "row 2 has the action exlude", r"did you mean exclude\?"),
    "no action": ([("cat/00.jpg", "", "dog")], "row 2 has no action", "write exclude or relabel"),
    "no class": ([("cat/00.jpg", "relabel", " ")], "row 2 relabels cat/00.jpg, but has no class", "exclude it"),
    "no file": ([("", "exclude", "")], "row 2 has no file", "predictions.csv"),
    "two classes": (
        [("cat/00.jpg", "relabel", "dog"), ("pets/cat/00.jpg", "relabel", "owl")],
        "contradicts itself for pets/cat/00.jpg: row 2 relabels it to dog, row 3 relabels it to owl",
        "remove one of the rows",
    ),
    "two actions": (
        [("cat/00.jpg", "exclude", ""), ("cat/00.jpg", "relabel", "owl")],
        "row 2 excludes it, row 3 relabels it to owl",
        "remove one",
    ),
    "a whole class": ([(f"cat/{i:02d}.jpg", "relabel", "dog") for i in range(20)], "no training example of cat", ""),
    "a whole split": ([(f"{c}/{i:02d}.jpg", "exclude", "") for c in CLASSES for i in range(20)], "excludes all", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_an_invalid_list_is_explained(tmp_path: Path, pets: Path, name: str) -> None:
    rows, problem, fix = FAULTS[name]
    file = write_corrections(tmp_path, *rows)
    key, value = (None, None) if "whole" in name else ("data.corrections", file)
    with raises(DataError, key, value, fix, problem):
        open_folder(tmp_path, pets, corrections=file)


def test_a_missing_list_is_named(tmp_path: Path, pets: Path) -> None:
    with raises(DataError, "data.corrections", "gone.csv", "file,action,class", "does not exist"):
        open_folder(tmp_path, pets, corrections="gone.csv")


def test_equal_rows_count_once_and_unknown_ones_can_be_omitted(tmp_path: Path, pets: Path) -> None:
    rows = [
        ("cat/00.jpg", "exclude", ""),
        ("x/pets/cat/00.jpg", "exclude", ""),
        ("dog/00.jpg", "relabel", "dog"),
        ("gone.jpg", "exclude", ""),
    ]
    file = write_corrections(tmp_path, *rows)
    dataset = open_folder(tmp_path, pets, corrections=file, on_error="skip")
    assert f"corrections: 1 excluded, 1 relabelled ({file}); 1 had the class already" in dataset.notes
    assert any(
        "1 of 4 rows name no file or record of pets: gone.jpg (row 5); they are omitted" in n for n in dataset.notes
    )
    assert sum(count_classes(dataset).values()) == 59


def test_names_that_are_no_utf8_or_would_be_formulas_are_corrected_as_predictions_csv_has_them(tmp_path: Path) -> None:
    root = fill_folder(tmp_path / "pets", {"cat": 6, "dog": 6})
    for number, name in enumerate((b"=cmd.jpg", b"caf\xe9.jpg", b"two\nlines.jpg", b"'quoted'.jpg")):
        (Path(str(root)) / "cat" / name.decode(errors="surrogateescape")).write_bytes(encode_noise(50 + number))
    files = (r"cat/caf\xe9.jpg", r"cat/two\nlines.jpg", "cat/'quoted'.jpg", "cat/=cmd.jpg")
    file = write_corrections(tmp_path, *((name, "relabel", "dog") for name in files))
    dataset = open_folder(tmp_path, root, corrections=file)
    assert sum(split.labels.sum() for split in dataset.splits.values()) == 6 + 4


def test_a_run_does_not_resume_with_other_corrections(tmp_path: Path, pets: Path) -> None:
    one = write_corrections(tmp_path, ("cat/00.jpg", "exclude", ""), ("cat/01.jpg", "exclude", ""))
    reordered = write_corrections(tmp_path, ("cat/01.jpg", "exclude", ""), ("cat/00.jpg", "exclude", ""), name="b.csv")
    other = write_corrections(tmp_path, ("cat/01.jpg", "exclude", ""), name="c.csv")
    first = open_folder(tmp_path, pets, corrections=one)
    recorded = json.loads(json.dumps({"data_fingerprint": first.fingerprints}))
    check_same_data("run", recorded, open_folder(tmp_path, pets, corrections=reordered))
    with raises(DataError, "output_dir", "run", problem="was trained on other data"):
        check_same_data("run", recorded, open_folder(tmp_path, pets, corrections=other))

    def config(file: str | None) -> Any:
        data = {"source": "image_folder", "root": "x", "corrections": file}
        return validate_resolved_config(
            {"data": data, "model": {"backbone": "MobileNetV2"}, "phases": {"head": {"thaw": "none", "epochs": 1}}}
        )

    assert list_forbidden_changes(config(one), config(reordered)) == []  # the fingerprint decides
    assert list_forbidden_changes(config(None), config(one)) == [f"data.corrections: None -> {one}"]


def test_a_prefix_of_class_names_is_not_shown(tmp_path: Path) -> None:
    root = fill_folder(tmp_path / "dogs", {"n02085620-Chihuahua": 10, "n02085782-Spaniel": 10, "wolf": 10})
    plain = open_folder(tmp_path, root)
    dataset = open_folder(tmp_path, root, class_prefix=r"n\d+-")
    assert dataset.class_names == ("Chihuahua", "Spaniel", "wolf")
    assert dataset.splits["train"].labels.tolist() == plain.splits["train"].labels.tolist()
    assert dataset.fingerprint != plain.fingerprint
    ordered = open_folder(tmp_path, root, class_prefix=r"n\d+-", class_names=("wolf", "Spaniel", "n02085620-Chihuahua"))
    assert ordered.class_names == ("wolf", "Spaniel", "Chihuahua")
    rows = [("wolf/00.jpg", "relabel", "Spaniel"), ("wolf/01.jpg", "relabel", "n02085620-Chihuahua")]
    corrected = list_labels_by_file(
        open_folder(tmp_path, root, class_prefix=r"n\d+-", corrections=write_corrections(tmp_path, *rows))
    )
    assert [corrected[str(root / "wolf" / f"0{i}.jpg")][1] for i in range(3)] == ["Spaniel", "Chihuahua", "wolf"]
    with raises(DataError, "data.class_prefix", ".*", "match less", "nothing is left of n02085620-Chihuahua"):
        open_folder(tmp_path, root, class_prefix=".*")
    shutil.copytree(root / "wolf", root / "n1-wolf")
    with raises(DataError, "data.class_prefix", r"n\d+-", "match less", "n1-wolf and wolf both become wolf"):
        open_folder(tmp_path, root, class_prefix=r"n\d+-")


def test_class_names_can_be_mapped_to_shown_names(tmp_path: Path) -> None:
    root = fill_folder(tmp_path / "pets", {"n01": 10, "n02-dog": 10, "cat": 10, "caf\u00e9": 10})
    shown = {"n01": "cat", "cat": "lynx", "cafe\u0301": "<b>red, \u202erose</b>\n"}  # the folder is NFC, the key NFD
    plain, mapped = open_folder(tmp_path, root), open_folder(tmp_path, root, class_names=shown, class_prefix=r"n\d+-")
    assert plain.class_names == ("caf\u00e9", "cat", "n01", "n02-dog")
    assert mapped.class_names == (r"<b>red, \u202erose</b>\n", "lynx", "cat", "dog")
    for name, split in mapped.splits.items():
        assert split.labels.tolist() == plain.splits[name].labels.tolist()
    assert mapped.fingerprint != plain.fingerprint
    assert mapped.fingerprint == open_folder(tmp_path, root, class_names={**shown, "n02-dog": "dog"}).fingerprint
    rows = [("n01/00.jpg", "relabel", "dog"), ("n01/01.jpg", "relabel", "n02-dog"), ("n01/02.jpg", "relabel", "cat")]
    options = {"class_names": {"n01": "cat", "cat": "lynx", "n02-dog": "dog"}}
    corrected = list_labels_by_file(
        open_folder(tmp_path, root, **options, corrections=write_corrections(tmp_path, *rows))
    )
    assert [corrected[str(root / "n01" / f"0{i}.jpg")][1] for i in range(3)] == ["dog", "dog", "cat"]


@pytest.mark.parametrize(
    ("names", "fix", "problem"),
    [
        ({"dog": "cat"}, "a name of its own", "cat and dog both become cat"),
        ({"dog": "pet", "owl": "pet"}, "a name of its own", "dog and owl both become pet"),
        ({"dog": "caf\u00e9", "owl": "cafe\u0301"}, "a name of its own", "dog and owl both become"),
        ({"dgo": "pet"}, "^did you mean dog", "maps dgo, which is no class of the data"),
        ({"xyzzy": "pet"}, "its classes are cat, dog, owl", "maps xyzzy"),
        ({"dog": "a", " dog": "b"}, "give each class one name", "several names for dog"),
    ],
)
def test_a_mapping_that_does_not_fit_the_classes_is_rejected(
    tmp_path: Path, pets: Path, names: dict[str, str], fix: str, problem: str
) -> None:
    with raises(DataError, "data.class_names", None, fix, problem):
        open_folder(tmp_path, pets, class_names=names)


def test_an_evaluation_maps_the_classes_that_the_data_has(tmp_path: Path) -> None:
    root = fill_folder(tmp_path / "few", {"n01": 4, "dog": 4})
    options = {"class_names": {"n01": "cat", "n02": "dog", "n03": "owl"}, "purpose": "evaluate"}
    assert open_folder(tmp_path, root, **options, validation_fraction=0.0).class_names == ("dog", "cat")


def test_a_mapping_names_records_that_have_only_numbers(tmp_path: Path) -> None:
    write_records(tmp_path / "records", {"train": [0, 1, 2] * 10}, shards=5)
    data = {"source": "tfrecords", "pattern": f"{tmp_path}/records/*.tfrecord*"}
    partly = open_logged(tmp_path, **data, class_names={"dog": "hound"})  # the classes have names next to the records
    assert partly.class_names == ("cat", "hound", "owl")
    (tmp_path / "records" / "label.labels.txt").unlink()
    assert open_logged(tmp_path, **data, class_names={"b": "x", "a": "y", "c": "c"}).class_names == ("x", "y", "c")
