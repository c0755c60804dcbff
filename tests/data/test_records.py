"""TFRecord shards: what is written, what TFDS and TensorFlow read, and what damage is called."""

import gzip
import io
import json
import os
from pathlib import Path

import google_crc32c
import pytest
from PIL import Image

from tests.data.pictures import fill_folder, picture
from trainer.data.records import RecordAt, frame, index_shard, read_image, read_labels, serialize
from trainer.data.tfds_folder import MANIFEST
from trainer.data.tfds_writer import LabelledImages, WriteOptions, write_dataset
from trainer.errors import DataError

CLASSES = ("cat", "dog")


def count_records(path: Path) -> int:
    index = index_shard(path)
    if index.fault:
        raise DataError(index.fault)
    return index.count


def write_shard(path: Path, payloads: list[bytes]) -> Path:
    path.write_bytes(b"".join(piece for p in payloads for piece in (frame(p)[0], p, frame(p)[1])))
    return path


def small_set(root: Path, count: int = 12) -> list[tuple[Path, int]]:
    fill_folder(root, dict.fromkeys(CLASSES, count // 2))
    return [(path, CLASSES.index(path.parent.name)) for path in sorted(root.glob("*/*"))]


def test_tensorflow_reads_our_records_and_examples(tmp_path: Path) -> None:
    import tensorflow as tf

    payloads = [serialize(picture(i), i) for i in range(3)]
    path = write_shard(tmp_path / "a.tfrec", payloads)
    records = list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator())
    assert records == payloads
    example = tf.train.Example.FromString(records[2])
    assert example.features.feature["image"].bytes_list.value[0] == picture(2)
    assert example.features.feature["label"].int64_list.value[0] == 2
    assert example.SerializeToString(deterministic=True) == records[2]


def test_tensorflows_own_records_are_read(tmp_path: Path) -> None:
    import tensorflow as tf

    feature = {
        "photo": tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"bytes"])),
        "class": tf.train.Feature(int64_list=tf.train.Int64List(value=[1])),
        "box": tf.train.Feature(float_list=tf.train.FloatList(value=[0.5, 1.5])),
    }
    payload = tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()
    path = str(tmp_path / "a.tfrec")
    with tf.io.TFRecordWriter(path) as writer:
        for _ in range(5):
            writer.write(payload)
    index = index_shard(path)
    assert count_records(path) == index.count == 5
    assert read_labels(path, index, "class", "photo", 2)[0].tolist() == [1] * 5
    assert read_image(RecordAt(path, 4, int(index.offsets[4]), int(index.lengths[4]), "photo")) == b"bytes"


def test_tfds_reads_what_is_written(tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    examples = small_set(tmp_path / "photos")
    photos = LabelledImages("My photos", CLASSES, {"train": examples[:10], "test": examples[10:]})
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
    assert [e["file"] for e in json.loads((tmp_path / "out" / MANIFEST).read_text())] == [e.file for e in manifest]
    assert not [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]


def test_processes_write_the_same_bytes_as_one(tmp_path: Path) -> None:
    examples, seen = small_set(tmp_path / "photos"), []
    images = LabelledImages("x", CLASSES, {"train": examples})
    one = write_dataset(tmp_path / "one", images, WriteOptions(shards=3))
    options = WriteOptions(shards=3, workers=2)
    two = write_dataset(tmp_path / "two", images, options, progress=lambda *p: seen.append(p))
    assert one == two
    assert seen[-1] == (12, 12)
    assert [e.file for e in one] == [f"x-train.tfrecord-0000{i}-of-00003" for i in range(3)]


def test_finished_shards_are_not_written_again(tmp_path: Path) -> None:
    examples, out = small_set(tmp_path / "photos"), tmp_path / "out"
    before = write_dataset(out, LabelledImages("x", CLASSES, {"train": examples}), WriteOptions(shards=3))
    shards = [out / entry.file for entry in before]
    kept = [path.stat().st_mtime_ns for path in shards]
    damaged = bytearray(shards[1].read_bytes())
    damaged[100] ^= 1
    shards[1].write_bytes(bytes(damaged))  # as after a torn write: same size, another checksum
    (out / ".x-train.tfrecord-00002-of-00003.0a1b.tmp").write_bytes(b"half a shard")
    assert write_dataset(out, LabelledImages("x", CLASSES, {"train": examples}), WriteOptions(shards=3)) == before
    assert [path.stat().st_mtime_ns == time for path, time in zip(shards, kept, strict=True)] == [True, False, True]
    assert google_crc32c.value(shards[1].read_bytes()) == int(before[1].crc32c, 16)
    assert not list(out.glob(".*"))


def test_a_run_that_dies_leaves_what_it_finished_and_no_dataset(tmp_path: Path) -> None:
    examples, out = small_set(tmp_path / "photos"), tmp_path / "out"

    def die(done: int, _total: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(out, LabelledImages("x", CLASSES, {"train": examples}), WriteOptions(shards=3), progress=die)
    assert not (out / "dataset_info.json").exists()
    first = out / "x-train.tfrecord-00000-of-00003"
    time = first.stat().st_mtime_ns
    manifest = write_dataset(out, LabelledImages("x", CLASSES, {"train": examples}), WriteOptions(shards=3))
    assert first.stat().st_mtime_ns == time
    assert (out / "dataset_info.json").exists()
    assert manifest == write_dataset(
        tmp_path / "whole", LabelledImages("x", CLASSES, {"train": examples}), WriteOptions(shards=3)
    )


def test_a_changed_label_is_written_again(tmp_path: Path) -> None:
    examples, out = small_set(tmp_path / "photos"), tmp_path / "out"
    before = write_dataset(out, LabelledImages("x", CLASSES, {"train": examples}), WriteOptions(shards=3))
    examples[0] = (examples[0][0], 1)
    after = write_dataset(out, LabelledImages("x", CLASSES, {"train": examples}), WriteOptions(shards=3))
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True, True]


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    examples, out = small_set(tmp_path / "photos"), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(DataError) as error:
        write_dataset(out, LabelledImages("x", CLASSES, {"train": examples}))
    assert str(error.value) == (
        f"{out} holds other files (thesis.txt); give an empty folder, or one where the same dataset was begun"
    )
    with pytest.raises(DataError) as error:
        write_dataset(out / "thesis.txt", LabelledImages("x", CLASSES, {"train": examples}))
    assert str(error.value) == f"{out}/thesis.txt cannot be written to: File exists; give an empty folder"


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P")])
def test_jpeg_and_png_bytes_are_kept(tmp_path: Path, kind: str, mode: str) -> None:
    image = picture(1, kind, mode)
    (entry,) = write_dataset(tmp_path, LabelledImages("x", CLASSES, {"train": [(image, 0)]}))
    path = str(tmp_path / entry.file)
    index = index_shard(path)
    assert read_image(RecordAt(path, 0, int(index.offsets[0]), int(index.lengths[0]), "image")) == image


@pytest.mark.parametrize("kind", ["BMP", "GIF"])
def test_other_formats_become_png_without_loss(tmp_path: Path, kind: str) -> None:
    image = picture(1, kind)
    (entry,) = write_dataset(tmp_path, LabelledImages("x", CLASSES, {"train": [(image, 0)]}))
    path = str(tmp_path / entry.file)
    index = index_shard(path)
    stored = Image.open(
        io.BytesIO(read_image(RecordAt(path, 0, int(index.offsets[0]), int(index.lengths[0]), "image")))
    )
    assert stored.format == "PNG"
    assert stored.convert("RGB").tobytes() == Image.open(io.BytesIO(image)).convert("RGB").tobytes()


def test_damaged_images_are_named_or_skipped(tmp_path: Path) -> None:
    examples, out = small_set(tmp_path / "photos"), tmp_path / "out"
    for path, _ in (examples[1], examples[7]):
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError) as error:
        write_dataset(out, LabelledImages("x", CLASSES, {"train": examples}), WriteOptions(shards=2))
    lines = str(error.value).splitlines()
    assert lines[0] == "2 images cannot be decoded; repair or remove them, or set data.on_error=skip:"
    assert lines[1].startswith(f"  {examples[1][0]}: ")
    assert lines[2].startswith(f"  {examples[7][0]}: ")
    assert not (out / "dataset_info.json").exists()
    manifest = write_dataset(
        out, LabelledImages("x", CLASSES, {"train": examples}), WriteOptions(shards=2, on_error="skip")
    )
    assert [entry.count for entry in manifest] == [5, 5]
    assert str(examples[1][0]) in manifest[0].skipped[0]
    with pytest.raises(DataError, match="2 images cannot be decoded"):  # the finished shards do not hide them
        write_dataset(out, LabelledImages("x", CLASSES, {"train": examples}), WriteOptions(shards=2))


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        write_dataset(tmp_path / "out", LabelledImages("x", CLASSES, {"train": [(tmp_path / "gone.jpg", 0)]}))
    assert str(error.value) == f"{tmp_path}/gone.jpg cannot be read: No such file or directory"


@pytest.mark.parametrize("cut", [1, 5, 400])
def test_a_truncated_shard_is_named_with_the_record(tmp_path: Path, cut: int) -> None:
    path = write_shard(tmp_path / "a.tfrec", [serialize(picture(i), 0) for i in range(4)])
    assert count_records(path) == 4
    os.truncate(path, path.stat().st_size - cut)
    with pytest.raises(DataError) as error:
        count_records(path)
    assert str(error.value) == (
        f"shard {path} is truncated: it ends inside record 3, {cut} bytes early; "
        "fetch or write it again, or set data.on_error=skip to use the records before it"
    )
    assert index_shard(path).count == 3


def test_a_cut_inside_a_header_and_a_damaged_header_are_named(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tfrec", [b"x" * 50] * 3)
    content = path.read_bytes()
    path.write_bytes(content[: 2 * 66 + 5])
    with pytest.raises(DataError, match=r"a\.tfrec is truncated: it ends inside record 2, 7 bytes early"):
        count_records(path)
    path.write_bytes(content[:66] + b"\xff" + content[67:])
    with pytest.raises(DataError, match=r"a\.tfrec is damaged at the head of record 1: fetch or write it again"):
        count_records(path)


def test_other_files_are_no_shards(tmp_path: Path) -> None:
    path = tmp_path / "a.tfrec"
    advice = "uncompressed TFRecord files of tf.train.Example are read"
    path.write_bytes(b"something else entirely")
    with pytest.raises(DataError) as error:
        count_records(path)
    assert str(error.value) == f"shard {path} is no TFRecord file; {advice}"
    path.write_bytes(gzip.compress(b"something"))
    with pytest.raises(DataError) as error:
        count_records(path)
    assert str(error.value) == f"shard {path} is gzip-compressed; {advice}"
    with pytest.raises(DataError) as error:
        count_records(tmp_path / "gone")
    assert str(error.value) == f"shard {tmp_path}/gone cannot be read: No such file or directory"
    path.write_bytes(b"")
    assert count_records(path) == 0


def test_wrong_labels_are_named(tmp_path: Path) -> None:
    path = str(write_shard(tmp_path / "a.tfrec", [serialize(b"image", 0), serialize(b"image", 7)]))
    index, has = index_shard(path), "it has image (bytes), label (int64)"

    def message(label: str, image: str) -> str:
        with pytest.raises(DataError) as error:
            read_labels(path, index, label, image, 5)
        return str(error.value)

    assert message("class", "image") == f"record 0 of shard {path} has no field 'class'; {has}: set data.label_field"
    assert message("label", "photo") == (
        f"record 0 of shard {path} has no image bytes in the field 'photo'; {has}: set data.image_field"
    )
    assert message("image", "image") == (
        f"the label field 'image' of record 0 of shard {path} is not one int64; {has}: set data.label_field"
    )
    assert message("label", "image") == (
        f"the label 7 in the field 'label' of record 1 of shard {path} is outside 0..4: there are 5 class names"
    )
