"""Groups of examples, read from one more field of their records."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from tests.data.images import encode_noise, serialize_record
from tests.data.test_open import CLASSES, open_logged, write_records
from tests.errors import raises
from trainer.config.schema import validate_config
from trainer.data.prepare import prepare
from trainer.data.records import read_groups
from trainer.errors import ConfigError, DataError
from trainer.types import Shard, Split

SITES = ("north", "south")
REST = {"model": {"backbone": "MobileNetV2"}, "phases": {"head": {"thaw": "none", "epochs": 1}}}  # of no matter here


def write_dataset_with_groups(root: Path, counts: dict[str, int], shards: int = 2) -> Path:
    """A TFDS folder as TFDS itself would prepare it: image, label, a text, a number, a named number and a float.

    Example k (counted over the splits) has label k % 3, camera "a", "b" or "a b", ward k % 4, site k % 2.
    """
    root.mkdir(parents=True)
    template = tfds.core.ShardedFileTemplate(data_dir=root, dataset_name="clinic", filetype_suffix="tfrecord")
    infos, k = [], 0
    for split, count in counts.items():
        lengths = [len(part) for part in np.array_split(np.arange(count), shards)]
        for number, length in enumerate(lengths):
            name = f"clinic-{split}.tfrecord-{number:05d}-of-{shards:05d}"
            with tf.io.TFRecordWriter(str(root / name)) as writer:
                for _ in range(length):
                    fields = {"camera": name_camera(k).encode(), "ward": k % 4, "site": k % 2, "quality": [0.5]}
                    writer.write(serialize_record(image=encode_noise(k), label=k % 3, **fields))
                    k += 1
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=1,
                                         filename_template=template.replace(split=split)))  # fmt: skip
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(names=list(CLASSES)),
        "camera": tfds.features.Text(),
        "ward": tfds.features.Scalar(np.int64),
        "site": tfds.features.ClassLabel(names=list(SITES)),
        "quality": tfds.features.Scalar(np.float32),
    }
    tfds.folder_dataset.write_metadata(
        data_dir=root, features=features, split_infos=infos, filename_template=template, version="1.0.0",
        check_data=False,
    )  # fmt: skip
    return root


def name_camera(k: int) -> str:
    return ("a", "b", "ä b")[k % 5 % 3]


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset_with_groups(tmp_path_factory.mktemp("data") / "clinic", {"train": 30, "test": 11})


@pytest.mark.parametrize(
    ("field", "value"),
    [("camera", name_camera), ("ward", lambda k: str(k % 4)), ("site", lambda k: SITES[k % 2])],
)
def test_a_field_of_text_numbers_or_names_gives_each_test_example_its_group(
    tmp_path: Path, clinic: Path, field: str, value: Any
) -> None:
    dataset = open_logged(tmp_path, source="tfds", root=str(clinic), group_field=field)
    assert dataset.splits["test"].groups == tuple(value(k) for k in range(30, 41))
    assert dataset.splits["train"].groups is None
    assert dataset.splits["validation"].groups is None
    plain = open_logged(tmp_path, source="tfds", root=str(clinic))
    assert plain.splits["test"].groups is None
    assert plain.fingerprint == dataset.fingerprint


def test_groups_follow_the_examples_that_max_examples_selects(tmp_path: Path, clinic: Path) -> None:
    splits = {"train_split": "train[:10]", "validation_split": "train[10:20]", "test_split": "train[:0%]+train[20:]"}
    dataset = open_logged(tmp_path, source="tfds", root=str(clinic), group_field="ward", max_examples=6, **splits)
    split = dataset.splits["test"]
    numbers = [n + 15 * ("00001-of" in s.path) for s in split.shards for n in range(s.start, s.stop)]
    assert split.count == len(numbers) == 6
    assert split.groups == tuple(str(number % 4) for number in numbers)


def test_tfrecord_patterns_have_groups_too(tmp_path: Path, clinic: Path) -> None:
    data = {"source": "tfrecords", "pattern": f"{clinic}/clinic-train*", "class_names": CLASSES}
    dataset = open_logged(tmp_path, **data, group_field="camera", validation_fraction=0.5)
    assert dataset.splits["validation"].groups == tuple(name_camera(k) for k in range(15))
    with raises(DataError, "data.group_field", "nothing", problem="does not have exactly one text or whole number"):
        open_logged(tmp_path, **data, group_field="nothing")


def test_fields_without_groups_are_named(tmp_path: Path, clinic: Path) -> None:
    prepared = write_records(tmp_path / "pets", {"train": [0, 1, 2] * 10})
    listed = r"camera \(bytes\), image \(bytes\), label \(int64\), quality \(float\)"
    for root, field, fix, problem in (
        (clinic, "sites", "set data.group_field=site$", "no such feature; it has camera, image, label, quality, site"),
        (clinic, "quality", listed, f"{clinic}/clinic-test.tfrecord-00000-of-00002 does not have exactly one text"),
        (prepared, "site", "python -m trainer.prepare", "pets has no such feature; it has image, label"),
    ):
        with raises(DataError, "data.group_field", field, fix, problem):
            open_logged(tmp_path, source="tfds", root=str(root), group_field=field)


@pytest.mark.parametrize("field", ["camera", "ward", "site", "label"])
def test_a_prepared_dataset_has_the_field_in_every_split(tmp_path: Path, clinic: Path, field: str) -> None:
    data = {"source": "tfds", "root": str(clinic), "group_field": field, "shards": 2}
    runtime = {"cache_dir": str(tmp_path / "cache"), "progress": "lines", "data_threads": 1}
    prepare(validate_config({**REST, "data": data, "runtime": runtime}), str(tmp_path / "out"))
    before = open_logged(tmp_path, **data, purpose="prepare")
    again = {**data, "root": str(tmp_path / "out")}
    after = open_logged(tmp_path, **again, purpose="prepare")
    assert set(after.splits) == {"train", "validation", "test"}
    for name, split in after.splits.items():
        assert split.groups is not None
        pairs = Counter(zip(split.groups, split.labels.tolist(), strict=True))
        source = before.splits[name]
        assert pairs == Counter(zip(source.groups or (), source.labels.tolist(), strict=True))
    scored = open_logged(tmp_path, **again)
    assert scored.splits["test"].groups == after.splits["test"].groups
    assert scored.splits["train"].groups is None


def test_a_field_that_prepared_records_need_is_rejected(tmp_path: Path, clinic: Path) -> None:
    names = {"class_names": ["a", "b", "c"], "label_field": "ward", "group_field": "label"}
    config = validate_config({**REST, "data": {"source": "tfrecords", "pattern": f"{clinic}/*", **names}})
    with raises(ConfigError, "data.group_field", "label", "set another field", "store the image or the label"):
        prepare(config, str(tmp_path / "out"))


def test_a_field_with_a_value_per_example_is_no_group(tmp_path: Path) -> None:
    path = str(tmp_path / "a.tfrec")
    with tf.io.TFRecordWriter(path) as writer:
        for k in range(120):
            writer.write(serialize_record(who=f"patient {k:03d}".encode()))
    split = Split("test", np.zeros(120, np.int32), shards=(Shard(path, 120, 0, 120),))
    problem = "120 different values among the 120 test examples, such as 'patient 000'"
    with raises(DataError, "data.group_field", "who", "at most 100", problem):
        read_groups(split, "who")
    few = Split("test", np.zeros(3, np.int32), shards=(Shard(path, 120, 5, 7), Shard(path, 120, 9, 10)))
    assert read_groups(few, "who") == ("patient 005", "patient 006", "patient 009")


def test_labels_of_a_tfds_dataset_may_be_text_or_numbers(clinic: Path, tmp_path: Path) -> None:
    data = {"source": "tfds", "root": str(clinic), "validation_fraction": 0}
    text = open_logged(tmp_path, **data, label_field="camera", label_kind="text", class_names=("b", "a", "ä b"))
    assert [text.class_names[i] for i in text.splits["train"].labels] == [name_camera(k) for k in range(30)]
    numbers = open_logged(tmp_path, **data, label_field="ward", class_names=("w0", "w1", "w2", "w3"))
    assert numbers.splits["train"].labels.tolist() == [k % 4 for k in range(30)]
    fix = "set data.label_field=.*, or set data.class_names, and data.label_kind=text"
    with raises(DataError, "data.label_field", "camera", fix, "has no ClassLabel of this name; it has camera .Text.,"):
        open_logged(tmp_path, **data, label_field="camera")
    with raises(
        DataError, "data.label_kind", "index1", "leave it out", "label of clinic is a ClassLabel, which counts"
    ):
        open_logged(tmp_path, **data, label_kind="index1")
