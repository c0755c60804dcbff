"""TFRecord shards: their content, reading them with TFDS and TensorFlow, and errors of damaged ones."""

import gzip
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from PIL import Image

from tests.data.images import encode_noise, fill_folder, serialize_record
from tests.errors import raises
from trainer.data.records import (
    LabelFields,
    frame_record,
    get_example_class,
    index_shard,
    locate_records,
    read_groups,
    read_image,
    read_labels,
    serialize_example,
)
from trainer.data.tfds_folder import MANIFEST_FILE, ShardEntry
from trainer.data.tfds_writer import ImageSource, LabeledImages, WriteOptions, write_dataset
from trainer.errors import DataError
from trainer.types import Shard, Split

CLASSES = ("cat", "dog")
Examples = list[tuple[ImageSource, int]]


def write_shard(path: Path, payloads: list[bytes]) -> Path:
    path.write_bytes(b"".join(map(frame_record, payloads)))
    return path


def write(out: Path, examples: Sequence[tuple[ImageSource, int]], **options: Any) -> list[ShardEntry]:
    return write_dataset(out, LabeledImages("x", CLASSES, {"train": examples}), WriteOptions(**options)) or []


def read_stored_images(path: Path, field: str = "image") -> list[bytes]:
    count = index_shard(path).count
    split = Split("train", np.zeros(count, np.int32), shards=(Shard(str(path), count, 0, count),), image_field=field)
    return [read_image(record) for record in locate_records(split)]


@pytest.fixture
def examples(tmp_path: Path) -> Examples:
    """Six images of each class."""
    root = fill_folder(tmp_path / "photos", dict.fromkeys(CLASSES, 6))
    return [(path, CLASSES.index(path.parent.name)) for path in sorted(root.glob("*/*"))]


def test_tensorflow_reads_our_records_and_examples(tmp_path: Path) -> None:
    import tensorflow as tf

    payloads = [serialize_example(encode_noise(i), i) for i in range(3)]
    path = write_shard(tmp_path / "a.tfrec", payloads)
    records = list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator())
    assert records == payloads
    example = tf.train.Example.FromString(records[2])
    assert example.features.feature["image"].bytes_list.value[0] == encode_noise(2)
    assert example.features.feature["label"].int64_list.value[0] == 2
    assert example.SerializeToString(deterministic=True) == records[2]


def test_tensorflows_own_records_are_read(tmp_path: Path) -> None:
    import tensorflow as tf

    payload = serialize_record(photo=b"bytes", box=[0.5, 1.5], **{"class": 1})
    path = str(tmp_path / "a.tfrec")
    with tf.io.TFRecordWriter(path) as writer:
        for _ in range(5):
            writer.write(payload)
    assert read_labels(path, index_shard(path), LabelFields("class", "photo", 2))[0].tolist() == [1] * 5
    assert read_stored_images(Path(path), "photo") == [b"bytes"] * 5


def test_tfds_reads_what_is_written(tmp_path: Path, examples: Examples) -> None:
    import tensorflow_datasets as tfds

    photos = LabeledImages("My photos", CLASSES, {"train": examples[:10], "test": examples[10:]})
    manifest = write_dataset(tmp_path / "out", photos, WriteOptions(shards=2))
    builder = tfds.builder_from_directory(tmp_path / "out")
    assert builder.info.name == "my_photos"
    assert builder.info.features["label"].names == list(CLASSES)
    assert builder.info.splits["train"].shard_lengths == [5, 5]
    assert builder.info.splits["test"].num_examples == 2
    decoders = {"image": tfds.decode.SkipDecoding()}
    read = [
        (e["image"], e["label"])
        for e in tfds.as_numpy(builder.as_dataset(split="train", decoders=decoders, shuffle_files=False))
    ]
    assert read == [(path.read_bytes(), label) for path, label in examples[:10]]
    decoded = next(iter(tfds.as_numpy(builder.as_dataset(split="test"))))
    assert decoded["image"].shape == (12, 12, 3)
    assert [entry.count for entry in manifest] == [5, 5, 2]
    for entry in manifest:
        content = (tmp_path / "out" / entry.file).read_bytes()
        assert (entry.bytes, entry.crc32c) == (len(content), f"{google_crc32c.value(content):08x}")
    assert [e["file"] for e in json.loads((tmp_path / "out" / MANIFEST_FILE).read_text())] == [e.file for e in manifest]
    assert not [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]


def test_processes_write_the_same_bytes_as_one(tmp_path: Path, examples: Examples) -> None:
    seen: list[tuple[int, int]] = []
    dataset = LabeledImages("x", CLASSES, {"train": examples})
    one = write(tmp_path / "one", examples, shards=3)
    two = write_dataset(tmp_path / "two", dataset, WriteOptions(3, workers=2), lambda *counts: seen.append(counts))
    assert one == two
    assert seen[-1] == (12, 12)
    assert [e.file for e in one] == [f"x-train.tfrecord-0000{i}-of-00003" for i in range(3)]


def test_finished_shards_are_not_written_again(tmp_path: Path, examples: Examples) -> None:
    out = tmp_path / "out"
    before = write(out, examples, shards=3)
    shards = [out / entry.file for entry in before]
    times = [path.stat().st_mtime_ns for path in shards]
    damaged = bytearray(shards[1].read_bytes())
    damaged[100] ^= 1
    shards[1].write_bytes(bytes(damaged))  # as after a torn write: same size, another checksum
    (out / ".x-train.tfrecord-00002-of-00003.0a1b.tmp").write_bytes(b"half a shard")
    assert write(out, examples, shards=3) == before
    assert [path.stat().st_mtime_ns == time for path, time in zip(shards, times, strict=True)] == [True, False, True]
    assert google_crc32c.value(shards[1].read_bytes()) == int(before[1].crc32c, 16)
    assert not list(out.glob(".*"))
    examples[0] = (examples[0][0], 1)  # another label
    after = write(out, examples, shards=3)
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True, True]


def test_an_interrupted_write_leaves_finished_shards_and_no_dataset(tmp_path: Path, examples: Examples) -> None:
    out = tmp_path / "out"

    def interrupt(done: int, _total: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(out, LabeledImages("x", CLASSES, {"train": examples}), WriteOptions(shards=3), interrupt)
    assert not (out / "dataset_info.json").exists()
    first = out / "x-train.tfrecord-00000-of-00003"
    time = first.stat().st_mtime_ns
    manifest = write(out, examples, shards=3)
    assert first.stat().st_mtime_ns == time
    assert (out / "dataset_info.json").exists()
    assert manifest == write(tmp_path / "whole", examples, shards=3)


def test_a_folder_with_other_files_is_rejected(tmp_path: Path, examples: Examples) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with raises(DataError, "output", str(tmp_path), "set an empty folder", r"other files \(photos, thesis.txt\)"):
        write(tmp_path, examples)
    with raises(DataError, "output", f"{tmp_path}/thesis.txt", "set an empty folder", r"written to \(File exists\)"):
        write(tmp_path / "thesis.txt", examples)


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P")])
def test_jpeg_and_png_bytes_are_unchanged(tmp_path: Path, kind: str, mode: str) -> None:
    image = encode_noise(1, kind, mode)
    (entry,) = write(tmp_path, [(image, 0)])
    assert read_stored_images(tmp_path / entry.file) == [image]


@pytest.mark.parametrize("kind", ["BMP", "GIF"])
def test_other_formats_become_png_without_loss(tmp_path: Path, kind: str) -> None:
    image = encode_noise(1, kind)
    (entry,) = write(tmp_path, [(image, 0)])
    (content,) = read_stored_images(tmp_path / entry.file)
    stored = Image.open(io.BytesIO(content))
    assert stored.format == "PNG"
    assert stored.convert("RGB").tobytes() == Image.open(io.BytesIO(image)).convert("RGB").tobytes()


def test_damaged_images_are_named_or_skipped(tmp_path: Path, examples: Examples) -> None:
    out, damaged = tmp_path / "out", [Path(str(examples[i][0])) for i in (1, 7)]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:300])
    problem = rf"2 images cannot be read or decoded:\n  {damaged[0]}: .*\n  {damaged[1]}: "
    with raises(DataError, fix="data.on_error=skip", problem=problem):
        write(out, examples, shards=2)
    assert not (out / "dataset_info.json").exists()
    manifest = write(out, examples, shards=2, on_error="skip")
    assert [entry.count for entry in manifest] == [5, 5]
    assert str(damaged[0]) in manifest[0].skipped[0]
    with raises(DataError, problem=problem):  # the finished shards do not hide them
        write(out, examples, shards=2)


def test_a_damaged_image_of_a_record_is_named_with_its_file(tmp_path: Path) -> None:
    payloads = [
        serialize_example(encode_noise(i)[: 300 if i == 1 else None], i % 2, {"filename": f"cat/{i}.jpg"})
        for i in range(3)
    ]
    path = write_shard(tmp_path / "a.tfrec", payloads)
    split = Split("train", np.zeros(3, np.int32), shards=(Shard(str(path), 3, 0, 3),))
    examples: Examples = [(at, 0) for at in locate_records(split)]
    with raises(DataError, problem=rf"1 image cannot be read or decoded:\n  {path}#1 \(cat/1.jpg\): "):
        write(tmp_path / "out", examples)


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    with raises(DataError, fix="exists", problem=f"^{tmp_path}/gone.jpg cannot be read: No such file or directory"):
        write(tmp_path / "out", [(tmp_path / "gone.jpg", 0)])


@pytest.mark.parametrize("cut", [1, 5, 400])
def test_a_truncated_shard_is_named_with_the_record(tmp_path: Path, cut: int) -> None:
    path = write_shard(tmp_path / "a.tfrec", [serialize_example(encode_noise(i), 0) for i in range(4)])
    os.truncate(path, path.stat().st_size - cut)
    index = index_shard(path)
    assert index.error == f"shard {path} is truncated: it ends inside record 3, {cut} bytes early"
    assert index.count == 3


def test_a_cut_inside_a_header_and_a_damaged_header_are_named(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tfrec", [b"x" * 50] * 3)
    content = path.read_bytes()
    path.write_bytes(content[: 2 * 66 + 5])
    assert "is truncated: it ends inside record 2, 7 bytes early" in str(index_shard(path).error)
    path.write_bytes(content[:66] + b"\xff" + content[67:])
    assert "is corrupt at the header of record 1" in str(index_shard(path).error)


def test_other_files_are_no_shards(tmp_path: Path) -> None:
    path = tmp_path / "a.tfrec"
    for content, problem in ((b"something else entirely", "is not a TFRecord file"), (gzip.compress(b"x"), "is gzip")):
        path.write_bytes(content)
        with raises(DataError, fix="an uncompressed TFRecord file", problem=f"shard {path} {problem}"):
            index_shard(path)
    path.write_bytes(b"")
    assert index_shard(path).count == 0
    path.unlink()
    with raises(DataError, problem=f"{path} cannot be read: No such file or directory"):
        index_shard(path)


LISTED = r"image \(bytes\), label \(int64\)"


@pytest.mark.parametrize(
    ("label", "image", "key", "fix", "problem"),
    [
        ("class", "image", "label_field", LISTED, "record 0 of shard {} has no such field"),
        (
            "label",
            "photo",
            "image_field",
            LISTED,
            "record 0 of shard {} does not have exactly one bytes value in this field",
        ),
        ("image", "image", "label_kind", LISTED, "record 0 of shard {} holds the text image"),
        ("label", "image", "label_field", "class name", r"label 7 of record 1 of shard {} is outside 0\.\.4"),
    ],
)
def test_wrong_labels_are_named(tmp_path: Path, label: str, image: str, key: str, fix: str, problem: str) -> None:
    path = str(write_shard(tmp_path / "a.tfrec", [serialize_example(b"image", 0), serialize_example(b"image", 7)]))
    value = {"image_field": image, "label_field": label, "label_kind": "index"}[key]
    with raises(DataError, f"data.{key}", value, fix, problem.format(path)):
        read_labels(path, index_shard(path), LabelFields(label, image, 5))


NAMES = ("cat", "dog", "owl")


def write_and_read_labels(path: Path, values: list[Any], kind: str = "index") -> list[int]:
    """The labels of records with these values, which are numbers, text, or lists of them."""
    payloads = []
    for value in values:
        example = get_example_class().FromString(serialize_record(image=b"image"))
        feature = example.features.feature["label"]
        listed = value if isinstance(value, list) else [value]
        lists = {bytes: feature.bytes_list, int: feature.int64_list, float: feature.float_list}
        lists[type(listed[0]) if listed else int].value.extend(listed)
        payloads.append(example.SerializeToString())
    shard = str(write_shard(path / "a.tfrec", payloads))
    return read_labels(shard, index_shard(shard), LabelFields("label", "image", 3, kind, NAMES))[0].tolist()


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("index", [0, 2], [0, 2]),
        ("index1", [1, 3], [0, 2]),
        ("text", [b"owl", b"cat"], [2, 0]),
        ("onehot", [[0, 1, 0], [0.0, 0.0, 1.0]], [1, 2]),
    ],
)
def test_labels_are_read_as_configured(tmp_path: Path, kind: str, values: list[Any], expected: list[int]) -> None:
    assert write_and_read_labels(tmp_path, values, kind) == expected


@pytest.mark.parametrize(
    ("kind", "value", "key", "fix", "problem"),
    [
        ("index", 3, "label_field", "if labels begin with 1, set data.label_kind=index1", r"label 3 .* outside 0\.\.2"),
        ("index", 7, "label_field", "^set another field, or one class name per label", r"label 7 .* outside 0\.\.2"),
        (
            "index1",
            0,
            "label_field",
            "if labels begin with 0, set data.label_kind=index;",
            r"label 0 .* outside 1\.\.3",
        ),
        ("index", b"dog", "label_kind", "set data.label_kind=text", "record 0 of shard .* holds the text dog$"),
        ("index", [0, 1, 0], "label_kind", "set data.label_kind=onehot", r"holds 3 numbers \(0, 1, 0\)$"),
        (
            "index",
            [1, 2],
            "label_field",
            "keep one label per image",
            r"holds 2 labels \(1, 2\), and a classifier needs",
        ),
        (
            "index",
            [1, 1, 0],
            "label_field",
            "keep one label",
            r"holds 3 numbers \(1, 1, 0\), and a classifier needs one",
        ),
        ("index", [], "label_field", "set one of image", "holds no label, and a classifier needs one label"),
        ("index", 1.5, "label_field", "as integers", "holds the decimal number 1.5, which is not a class index"),
        ("text", 1, "label_kind", "set data.label_kind=index", "holds the number 1$"),
        ("text", b"yak", "label_field", "add it to cat, dog, owl", "the text yak, which is not in data.class_names"),
        ("onehot", 1, "label_kind", "set data.label_kind=index", "holds the number 1$"),
        ("onehot", [0.2, 0.8, 0.0], "label_field", "keep one", r"holds 3 numbers \(0.2, 0.8, 0\), and a"),
    ],
)
def test_other_labels_are_described(tmp_path: Path, kind: str, value: Any, key: str, fix: str, problem: str) -> None:
    with raises(DataError, f"data.{key}", kind if key == "label_kind" else "label", fix, problem):
        write_and_read_labels(tmp_path, [value], kind)


@pytest.mark.parametrize("kind", ["index", "onehot"])
@pytest.mark.parametrize("value", [[0, 1], [1.0, 0.0, 0.0, 0.0]])
def test_a_one_hot_label_of_another_number_of_classes_is_named(tmp_path: Path, kind: str, value: list[Any]) -> None:
    problem = rf"holds .* one-hot for {len(value)} classes, but there are 3 class names$"
    with raises(DataError, "data.class_names", None, f"give {len(value)} class names", problem):
        write_and_read_labels(tmp_path, [value], kind)


@pytest.mark.parametrize(("payload", "more"), [(b"hello", ""), (b"\xff\xd8\xff", ""), (b"", ": it has no fields")])
def test_a_payload_that_is_no_example_is_described(tmp_path: Path, payload: bytes, more: str) -> None:
    path = str(write_shard(tmp_path / "a.tfrec", [serialize_example(b"image", 0), payload]))
    labels, errors = read_labels(path, index_shard(path), LabelFields("label", "image", 3))
    assert labels.tolist() == [0, -1]
    assert errors == [f"record 1 of shard {path} is not a tf.train.Example, although its checksum matches{more}"]
    split = Split("train", labels, shards=(Shard(path, 2, 0, 2),))
    with raises(DataError, problem="a.tfrec#1 is not a tf.train.Example"):
        read_image(locate_records(split)[1])
    with raises(DataError, problem="record 1 of shard .* is not a tf.train.Example"):
        read_groups(split, "label")


@pytest.mark.parametrize("field", ["filename", "file_name", "image/filename"])
def test_errors_name_the_source_of_a_record(tmp_path: Path, field: str) -> None:
    payload = serialize_record(**{"label": 7, "image": b"x", field: b"cat/\x01.jpg"})
    path = str(write_shard(tmp_path / "a.tfrec", [payload]))
    named = rf"record 0 of shard {path} \(cat/\\x01.jpg\)"
    with raises(DataError, "data.label_field", "label", problem=f"the label 7 of {named} is outside 0..2"):
        read_labels(path, index_shard(path), LabelFields("label", "image", 3))
    with raises(DataError, "data.label_field", "other", problem=f"{named} has no such field"):
        read_labels(path, index_shard(path), LabelFields("other", "image", 3))
    split = Split("train", np.zeros(1, np.int32), shards=(Shard(path, 1, 0, 1),), image_field="other")
    with raises(
        DataError, "data.image_field", "other", problem=r"a.tfrec#0 \(cat/\\x01.jpg\) does not have exactly one"
    ):
        read_image(locate_records(split)[0])
    with raises(DataError, "data.group_field", "none", problem=f"{named} does not have exactly one"):
        read_groups(split, "none")
