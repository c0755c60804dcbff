"""Names of files, folders, classes and shards from outside: opened, decoded, prepared and reported, or rejected."""

import csv
import json
import os
import re
import shlex
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from tests.data.images import encode_noise, serialize_record
from tests.errors import raises
from tests.nasty import file_names
from trainer.cli.overrides import parse_value
from trainer.config.schema import Data, validate_config
from trainer.config.typed import format_argument
from trainer.data.images import CachePlan, Pixels, fill_cache
from trainer.data.open import open_dataset
from trainer.data.prepare import prepare
from trainer.data.records import frame_record, index_shard, locate_records, read_source_name
from trainer.data.shard_gate import LocalShards
from trainer.data.splits import find_matching_files
from trainer.data.tfds_writer import LabeledImages, write_dataset
from trainer.errors import ConfigError, DataError
from trainer.evaluation.metrics import score_predictions
from trainer.evaluation.predictions import write_predictions
from trainer.exporting.model_card import format_labels
from trainer.names import decode_cell, escape_unprintable, normalize_class_name
from trainer.runs.folder import parse_stored_config
from trainer.types import Dataset, Shard, Split


def open_folder(tmp_path: Path, notes: list[str] | None = None, **data: object) -> Dataset:
    log_message = (notes if notes is not None else []).append
    data = {"source": "image_folder", "root": str(tmp_path / "photos")} | data
    return open_dataset(
        Data.model_validate(data), seed=1, cache_dir=tmp_path / "cache", max_examples=None, log_message=log_message
    )


def fill_classes(root: Path, classes: list[str], files: list[str]) -> Path:
    number = 0
    for name in classes:
        for file in files:
            path = os.path.join(os.fsencode(root), os.fsencode(name), os.fsencode(file))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as image:
                image.write(encode_noise(number))
            number += 1
    return root


def make_image_names(seed: int, count: int) -> list[str]:
    return [os.fsdecode(os.fsencode(name)[:251]) + ".jpg" for name in file_names(seed, count)]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_nasty_names_are_opened_decoded_and_prepared(tmp_path: Path, seed: int) -> None:
    """Every image of every folder arrives; all files have one line per class, in UTF-8; a reader gets the names back."""
    folders: dict[str, str] = {}
    for name in file_names(seed, 30):
        folders.setdefault(normalize_class_name(name), name)
    fill_classes(tmp_path / "photos", list(folders.values()), make_image_names(seed + 100, 10))
    dataset = open_folder(tmp_path)
    assert dataset.class_names == tuple(sorted(folders))
    assert sum(split.count for split in dataset.splits.values()) == 10 * len(folders)
    assert format_labels(dataset.class_names).splitlines() == list(dataset.class_names)
    train = dataset.splits["train"]
    for file, label in zip(train.files, train.labels, strict=True):
        assert normalize_class_name(Path(file).parent.name) == dataset.class_names[label]
    sums = []
    for where in ("memory", "disk", "none"):
        pixels = Pixels(train, 12, "stretch", "fail")
        fill_cache(pixels, CachePlan(where, 1, ""), tmp_path / "cache", dataset.fingerprint)
        sums.append(int(pixels.read_images(np.arange(train.count)).sum()))
    assert len(set(sums)) == 1

    options = {"source": "image_folder", "root": str(tmp_path / "photos")}
    tree = {"data": options, "model": {"backbone": "MobileNetV2"}, "phases": {"head": {"thaw": "none", "epochs": 1}}}
    runtime = {"cache_dir": str(tmp_path / "cache"), "data_threads": 1}
    prepare(validate_config(tree | {"runtime": runtime}), str(tmp_path / "pre [2024]"))
    assert (tmp_path / "pre [2024]" / "label.labels.txt").read_text().split("\n")[:-1] == list(dataset.class_names)
    again = open_folder(tmp_path, source="tfds", root=str(tmp_path / "pre [2024]"))
    assert again.class_names == dataset.class_names
    assert {n: np.bincount(s.labels).tolist() for n, s in again.splits.items()} == {
        n: np.bincount(s.labels).tolist() for n, s in dataset.splits.items()
    }

    names = [train.name_of(index) for index in range(train.count)]
    probabilities = np.eye(len(folders), dtype=np.float32)[train.labels]
    write_predictions(
        tmp_path / "p.csv", score_predictions("train", dataset.class_names, train.labels, probabilities, names)
    )
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text("utf-8").splitlines()))
    assert [decode_cell(row["file"]) for row in rows] == names == [escape_unprintable(file) for file in train.files]
    assert [decode_cell(row["truth"]) for row in rows] == [dataset.class_names[label] for label in train.labels]
    for row in rows:
        assert not any(cell.lstrip().startswith(("=", "+", "-", "@")) for cell in (row["file"], row["truth"]))


def test_a_file_that_is_not_utf8_is_named_when_it_cannot_be_read(tmp_path: Path) -> None:
    fill_classes(tmp_path / "photos", ["cat", "dog"], ["caf\udce9.jpg", "b.jpg", "c.jpg"])
    (tmp_path / "photos" / "cat" / "caf\udce9.jpg").write_bytes(b"")
    with raises(DataError, problem=r"cat/caf\\xe9.jpg: is empty", fix="data.on_error=skip"):
        open_folder(tmp_path)
    assert open_folder(tmp_path, on_error="skip").skipped == (f"{tmp_path}/photos/cat/caf\\xe9.jpg: is empty",)


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_file_that_is_not_utf8_and_vanishes_is_named(tmp_path: Path, on_error: str) -> None:
    """TensorFlow's message has the bytes of the name, and Python cannot decode it."""
    fill_classes(tmp_path / "photos", ["cat", "dog"], ["caf\udce9.jpg", *(f"{i}.jpg" for i in range(5))])
    dataset = open_folder(tmp_path, validation_fraction=0.01)
    train = dataset.splits["train"]
    index = next(i for i, file in enumerate(train.files) if file.endswith("\udce9.jpg"))
    os.unlink(train.files[index])
    pixels = Pixels(train, 12, "stretch", on_error)  # type: ignore[arg-type]
    if on_error == "skip":
        fill_cache(pixels, CachePlan("memory", 1, ""), tmp_path, "")
        assert list(pixels.unreadable) == [index]
        assert "No such file" in pixels.unreadable[index]
        return
    with raises(DataError, problem=r"cannot decode .*/caf\\xe9.jpg: .* No such file", fix="data.on_error=skip"):
        fill_cache(pixels, CachePlan("memory", 1, ""), tmp_path, "")


@pytest.mark.parametrize(
    ("one", "other"), [("caf\u00e9", "cafe\u0301"), ("cat", "cat "), ("a\n", "a\\n"), ("\udce9", "\\xe9")]
)
def test_two_folders_of_one_class_name_are_rejected(tmp_path: Path, one: str, other: str) -> None:
    fill_classes(tmp_path / "photos", [one, other, "dog"], ["1.jpg"])
    with raises(DataError, "data.root", str(tmp_path / "photos"), "rename one", "are both the class") as caught:
        open_folder(tmp_path)
    assert repr(one).replace("\u00e9", "\\xe9").strip("'") in caught.value.problem


def test_splits_may_spell_a_class_differently(tmp_path: Path) -> None:
    fill_classes(tmp_path / "photos" / "train", ["caf\u00e9", "dog"], ["1.jpg", "2.jpg"])
    fill_classes(tmp_path / "photos" / "test", ["cafe\u0301", "dog"], ["1.jpg"])
    dataset = open_folder(tmp_path)
    assert dataset.class_names == ("caf\u00e9", "dog")
    assert dataset.splits["test"].labels.tolist() == [0, 1] or dataset.splits["test"].labels.tolist() == [1, 0]


def test_class_names_of_every_source_are_normalized(tmp_path: Path) -> None:
    names = ("cafe\u0301", "li\nne", " sp ")
    expected = ("caf\u00e9", r"li\nne", "sp")
    examples = [(encode_noise(i), i % 3) for i in range(12)]
    write_dataset(
        tmp_path / "tfds", LabeledImages("pets", [normalize_class_name(n) for n in names], {"train": examples})
    )
    labels = tmp_path / "tfds" / "label.labels.txt"
    labels.write_text(unicodedata.normalize("NFD", labels.read_text()))
    assert open_folder(tmp_path, source="tfds", root=str(tmp_path / "tfds")).class_names == expected
    for i in range(3):
        shard = b"".join(frame_record(serialize_record(image=encode_noise(3 * i + k), label=k)) for k in range(3))
        (tmp_path / f"{i}.tfrec").write_bytes(shard)
    pattern = str(tmp_path / "*.tfrec")
    assert open_folder(tmp_path, source="tfrecords", pattern=pattern, class_names=names).class_names == expected
    with raises(DataError, problem="duplicate class names: caf\u00e9", fix="use each class name once"):
        open_folder(tmp_path, source="tfrecords", pattern=pattern, class_names=("caf\u00e9", "cafe\u0301", "x"))


@pytest.mark.parametrize(
    ("text", "name"),
    [("cafe\u0301", "caf\u00e9"), ("caf\u00e9", "cafe\u0301"), ("cat ", "cat"), ("cat", " cat"), ("\ufeffcat", "cat"),
     ("a\nb", r"a\nb")],
)  # fmt: skip
def test_a_label_that_is_text_names_its_class_in_any_spelling(tmp_path: Path, text: str, name: str) -> None:
    for i in range(2):
        labels = (text.encode(), b"dog", text.encode())
        shard = b"".join(
            frame_record(serialize_record(image=encode_noise(3 * i + k), label=label)) for k, label in enumerate(labels)
        )
        (tmp_path / f"{i}.tfrec").write_bytes(shard)
    pattern, names = str(tmp_path / "*.tfrec"), ("dog", name)
    for _ in range(2):  # the second time the labels are cached
        dataset = open_folder(tmp_path, source="tfrecords", pattern=pattern, class_names=names, label_kind="text")
        assert dataset.class_names == ("dog", normalize_class_name(name))
        assert dataset.splits["train"].labels.tolist() == [1, 0, 1]


FOREIGN = "a\n\x1b[31m\u202eb"  # another line, a colour, and text in another order
SHOWN = r"a\n\x1b[31m\u202eb"


def write_shard(path: Path, **values: bytes | int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(frame_record(serialize_record(**values)))
    return path


def test_what_a_record_holds_is_shown_on_one_line(tmp_path: Path) -> None:
    text, options = FOREIGN.encode(), {"source": "tfrecords", "class_names": ("a", "b"), "validation_fraction": 0}
    named = write_shard(tmp_path / "name.tfrec", image=b"no image", label=0, filename=text)
    index = index_shard(named)
    (at,) = locate_records(Split("train", np.zeros(1, np.int32), shards=(Shard(str(named), 1, 0, 1),)))
    assert (index.count, read_source_name(at)) == (1, SHOWN)
    label = write_shard(tmp_path / "text.tfrec", image=b"x", label=text)
    field = write_shard(tmp_path / "field.tfrec", **{FOREIGN: 1, "image": b"x"})
    for path, changes in ((label, {"label_kind": "text"}), (label, {}), (field, {})):
        with pytest.raises(DataError) as caught:
            open_folder(tmp_path, **options, pattern=str(path), **changes)
        assert SHOWN in str(caught.value)
        assert str(caught.value).isprintable()


def test_the_path_of_a_shard_is_shown_on_one_line(tmp_path: Path) -> None:
    path = write_shard(tmp_path / FOREIGN / f"{FOREIGN}.tfrec", image=b"x", label=0)
    path.write_bytes(path.read_bytes()[:-1])
    options = {"source": "tfrecords", "class_names": ("a", "b"), "validation_fraction": 0, "pattern": str(path)}
    for on_error in ("fail", "skip"):
        with pytest.raises(DataError) as caught:
            open_folder(tmp_path, **options, on_error=on_error)
        assert "is truncated" in str(caught.value)
        assert str(caught.value).isprintable()
    with pytest.raises(DataError) as caught:
        LocalShards().require("reader", [f"{path}x"], [])
    assert str(caught.value).isprintable()


def test_names_in_a_folder_of_images_are_shown_on_one_line(tmp_path: Path) -> None:
    root = fill_classes(
        tmp_path / "photos", [f"all/{FOREIGN}", "all/b", f"all2/{FOREIGN}"], ["1.jpg", "2.jpg", f"x.{FOREIGN}"]
    )
    notes: list[str] = []
    open_folder(tmp_path, notes, root=str(root))
    assert any("two folders deep" in note for note in notes)
    assert any(f"3 .{SHOWN} ignored" in note for note in notes)
    assert all(note.isprintable() for note in notes), notes


def test_the_features_of_a_dataset_are_shown_on_one_line(tmp_path: Path) -> None:
    examples = [(encode_noise(i), i % 2) for i in range(8)]
    texts = {FOREIGN: {"train": ["x"] * 8}}
    write_dataset(tmp_path / "set", LabeledImages("pets", ("a", "b"), {"train": examples}, texts))
    for change in ({"label_field": "x"}, {"image_field": "x"}, {"group_field": "x"}, {"train_split": "x"}):
        with pytest.raises(DataError) as caught:
            open_folder(tmp_path, source="tfds", root=str(tmp_path / "set"), **change)
        assert str(caught.value).isprintable(), str(caught.value)


@pytest.mark.parametrize("folder", ["photos [2024]", "a*b", "what?", "[x]"])
def test_a_folder_that_exists_is_no_pattern(tmp_path: Path, folder: str) -> None:
    home = tmp_path / folder / "in"
    home.mkdir(parents=True)
    (tmp_path / "photos 2" / "in").mkdir(parents=True)
    for path in (home / "1.tfrec", home / "[2].tfrec", tmp_path / "photos 2" / "in" / "3.tfrec"):
        path.write_bytes(b"")
    both = [str(home / "1.tfrec"), str(home / "[2].tfrec")]
    assert find_matching_files(f"{home}/*.tfrec") == both
    assert find_matching_files(f"{tmp_path}/{folder}/i[n]/*.tfrec") == both
    assert find_matching_files(f"{home}/[2].tfrec") == both[1:]
    assert find_matching_files(f"{home}/[1-9].tfrec") == both[:1]
    assert find_matching_files(f"{tmp_path}/**/3.tfrec") == [f"{tmp_path}/photos 2/in/3.tfrec"]
    assert find_matching_files(f"{home}") == []
    with raises(
        DataError,
        "data.pattern",
        str(home),
        rf"set {re.escape(format_argument('data.pattern', f'{home}/*.tfrec*'))}$",
        "is a folder",
    ):
        open_folder(tmp_path, source="tfrecords", pattern=str(home), class_names=("a", "b"))


def test_a_folder_with_the_characters_of_a_pattern_is_opened(tmp_path: Path) -> None:
    fill_classes(tmp_path / "photos [2024]", ["cat*", "[d]og"], ["1?.jpg", "[2].jpg"])
    dataset = open_folder(tmp_path, root=str(tmp_path / "photos [2024]"))
    assert (dataset.class_names, sum(s.count for s in dataset.splits.values())) == (("[d]og", "cat*"), 4)


@pytest.mark.parametrize(
    "data", [{"source": "tfds"}, {"source": "image_folder"}, {"source": "tfrecords", "class_names": ("a", "b")}]
)
def test_a_name_that_no_file_can_have_is_rejected(tmp_path: Path, data: dict[str, object]) -> None:
    key = "pattern" if data["source"] == "tfrecords" else "root"
    for name in ("x" * 300, f"{tmp_path}/{'x' * 300}/y", "/".join(["x" * 200] * 30)):
        with raises(DataError, f"data.{key}", name):
            open_folder(tmp_path, **data, root=name, pattern=name)


def get_first_word(advice: str) -> str:
    """The value of `KEY=VALUE` after `set ` or `with `, as a shell and this program read it."""
    (word, *_) = shlex.split(re.split("set |with ", advice, maxsplit=1)[1].replace(",", " ,"))
    return str(parse_value(word))


@pytest.mark.parametrize("name", ["photos", "my photos (1)", "it's", "a${b", "[2024]"])
def test_a_path_in_advice_can_be_pasted(tmp_path: Path, name: str) -> None:
    root = fill_classes(tmp_path / name, ["all/cat", "all/dog"], ["1.jpg", "2.jpg"])
    with pytest.raises(DataError) as caught:
        open_folder(tmp_path, root=str(root))
    assert get_first_word(str(caught.value.fix)) == str(root / "all")
    fill_classes(root, ["more/cat"], ["1.jpg"])
    notes: list[str] = []
    open_folder(tmp_path, notes, root=str(root))
    assert get_first_word(next(note for note in notes if "two folders deep" in note)) == str(root / "all")
    with pytest.raises(DataError) as caught:
        open_folder(tmp_path, source="tfrecords", pattern=str(root), class_names=("a", "b"))
    assert get_first_word(str(caught.value.fix)) == f"{root}/*.tfrec*"
    with pytest.raises(ConfigError) as rejected:
        parse_stored_config(b"[", str(root))
    assert get_first_word(str(rejected.value.fix)) == str(root)


def test_metadata_cannot_name_shards_elsewhere(tmp_path: Path) -> None:
    write_dataset(
        tmp_path / "secret", LabeledImages("pets", ("a", "b"), {"train": [(encode_noise(i), i % 2) for i in range(8)]})
    )
    root = tmp_path / "data"
    os.rename(tmp_path / "secret", root)
    (tmp_path / "elsewhere").mkdir()
    info = json.loads((root / "dataset_info.json").read_text())
    info["splits"][0]["filepathTemplate"] = "../elsewhere/{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    (root / "dataset_info.json").write_text(json.dumps(info))
    with raises(DataError, "data.train_split", "train", "prepare the dataset again", r"lists the shard \.\./elsewhere"):
        open_folder(tmp_path, source="tfds", root=str(root))
