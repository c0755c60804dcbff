"""What `trainer.prepare` writes is what training reads: the same images are rejected, and the others have equal pixels."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.images import encode_noise, fill_folder
from tests.data.splits_on_disk import open_pixels as pixels_of
from tests.data.test_open import open_folder, open_logged
from tests.data.test_orientation import encode_photo
from tests.disks import fill, small_disk
from tests.errors import raises
from tests.waiting import wait_until
from trainer.config.schema import validate_config
from trainer.data.prepare import prepare
from trainer.data.records import frame_record, locate_records, read_source_name, serialize_example
from trainer.data.tfds_folder import DatasetFolder
from trainer.data.tfds_writer import LabeledImages, WriteOptions, write_dataset
from trainer.errors import DataError
from trainer.monitoring.log import configure
from trainer.storage.base import is_temporary_name
from trainer.storage.local import make_temporary_suffix
from trainer.storage.path import storage_path
from trainer.types import Split


def prepare_folder(tmp_path: Path, root: Path, **data: Any) -> Path:
    """The folder that `trainer.prepare` writes of an image folder, all of it for training."""
    config = validate_config({
        "data": {"source": "image_folder", "root": str(root), "validation_fraction": 0, **data},
        "model": {"backbone": "MobileNetV2"}, "phases": {"head": {"thaw": "none", "epochs": 1}},
        "runtime": {"cache_dir": str(tmp_path / "cache"), "progress": "lines"},
    })  # fmt: skip
    prepare(config, str(tmp_path / "out"))
    return tmp_path / "out"


def encode_image(kind: str, mode: str, **options: Any) -> bytes:
    """An image of noise, whose alpha or transparent colour is noise as well."""
    out, pixels = io.BytesIO(), np.random.default_rng(3).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA").convert(mode)
    if kind == "GIF":
        options |= {"transparency": image.getpixel((0, 0))}
    image.save(out, kind, **options)
    return out.getvalue()


IMAGES = {
    "jpeg.jpg": encode_image("JPEG", "RGB"), "cmyk.jpg": encode_image("JPEG", "CMYK"), "turned.jpg": encode_photo(6),
    "grey.png": encode_image("PNG", "L"), "alpha.png": encode_image("PNG", "RGBA"), "turned.png": encode_photo(8, "PNG"),
    "transparent.gif": encode_image("GIF", "P"), "grey.gif": encode_image("GIF", "L"), "palette.bmp": encode_image("BMP", "P"),
    "opaque.webp": encode_image("WEBP", "RGB"), "alpha.webp": encode_image("WEBP", "RGBA", lossless=True),
    "turned.webp": encode_photo(5, "WEBP"), "photo.jfif": encode_image("JPEG", "L"),
}  # fmt: skip


def decode_by_name(split: Split, names: list[str], cache: Path) -> dict[str, np.ndarray]:
    rows = pixels_of(split, "none", cache, size=15).read_images(np.arange(split.count))
    return dict(zip(names, rows, strict=True))


@pytest.mark.parametrize("orientation", ["exif", "ignore"])
def test_prepared_images_have_the_pixels_of_the_files(tmp_path: Path, orientation: str) -> None:
    root = fill_folder(tmp_path / "photos", {"cat": 3, "dog": 3})
    for name, data in IMAGES.items():
        (root / "dog" / name).write_bytes(data)
    files = open_folder(tmp_path, root, orientation=orientation, validation_fraction=0).splits["train"]
    direct = decode_by_name(files, [str(Path(file).relative_to(root)) for file in files.files], tmp_path)
    out = prepare_folder(tmp_path, root, orientation=orientation)
    data = {"source": "tfds", "root": str(out), "orientation": orientation, "validation_fraction": 0}
    records = open_logged(tmp_path, **data).splits["train"]
    names = [read_source_name(record) for record in locate_records(records)]
    again = decode_by_name(records, names, tmp_path)
    assert (
        again.keys()
        == direct.keys()
        == {f"dog/{name}" for name in IMAGES} | {f"{name}/0{i}.jpg" for name in ("cat", "dog") for i in range(3)}
    )
    for name, image in direct.items():
        np.testing.assert_array_equal(again[name], image, name)


@pytest.mark.parametrize("orientation", ["exif", "ignore"])
def test_the_command_that_is_printed_reads_the_images_as_they_were_prepared(
    tmp_path: Path, orientation: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = fill_folder(tmp_path / "pets", {"cat": 3, "dog": 3})
    configure()
    out = prepare_folder(tmp_path, root, orientation=orientation)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "train on it" in line)
    command = f"python -m trainer data=tfds data.root={out}"
    assert line.partition("train on it: ")[2] == command + " data.orientation=ignore" * (orientation == "ignore")


def test_a_tiff_is_converted_and_one_with_16_bits_rejected(tmp_path: Path) -> None:
    root = fill_folder(tmp_path / "photos", {"cat": 3, "dog": 3})
    exif, tiff, png = Image.Exif(), io.BytesIO(), root / "dog" / "same.png"
    exif[0x0112] = 3
    image = Image.open(io.BytesIO(encode_image("PNG", "RGB")))
    image.save(tiff, "TIFF", exif=exif)
    (root / "dog" / "a.tif").write_bytes(tiff.getvalue())
    image.transpose(Image.Transpose.ROTATE_180).save(png)
    data = {"source": "tfds", "root": str(prepare_folder(tmp_path, root)), "validation_fraction": 0}
    records = open_logged(tmp_path, **data).splits["train"]
    names = [read_source_name(record) for record in locate_records(records)]
    by_name = decode_by_name(records, names, tmp_path)
    np.testing.assert_array_equal(by_name["dog/a.tif"], by_name["dog/same.png"])
    Image.fromarray(np.full((9, 9), 4000, np.uint16)).save(root / "dog" / "deep.tiff")
    with raises(
        DataError, fix="data.on_error=skip", problem="dog/deep.tiff: has pixels of mode I.*save it with 8 bits"
    ):
        prepare_folder(tmp_path / "other", root)


def make_damaged_files() -> dict[str, bytes]:
    png, jpeg = encode_noise(1, "PNG"), encode_noise(1)
    return {"no end.png": png[:-12], "half.png": png[: len(png) // 2], "half.jpg": jpeg[: len(jpeg) // 2],
            "short.jpg": jpeg[:-30], "half.bmp": encode_noise(1, "BMP")[:200], "half.gif": encode_noise(1, "GIF")[:400],
            "half.webp": encode_noise(1, "WEBP")[:60]}  # fmt: skip


def test_all_that_training_skips_is_rejected_by_name_or_skipped(tmp_path: Path) -> None:
    root = fill_folder(tmp_path / "photos", {"cat": 3, "dog": 3})
    paths = sorted(root / "dog" / name for name in make_damaged_files())
    for path in paths:
        path.write_bytes(make_damaged_files()[path.name])
    split = open_folder(tmp_path, root, validation_fraction=0).splits["train"]
    skipping = pixels_of(split, "memory", tmp_path, on_error="skip")
    assert sorted(split.name_of(index) for index in skipping.unreadable) == [str(path) for path in paths]
    out = prepare_folder(tmp_path, root, on_error="skip")
    records = open_logged(tmp_path, source="tfds", root=str(out), validation_fraction=0).splits["train"]
    assert records.count == 6
    pixels_of(records, "memory", tmp_path, fingerprint="prepared")
    for named, start in ((paths[:5], "7 images"), (paths[5:], "2 images")):  # a message has five names
        with raises(DataError, fix="data.on_error=skip", problem=f"{start} cannot be read or decoded:\n") as caught:
            prepare_folder(tmp_path / start, root)
        assert all(f"\n  {path}: " in caught.value.problem for path in named)
        for path in named:
            path.unlink()


# Quick: one alone; the test above has all.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "half.jpg" else pytest.mark.slow) for name in make_damaged_files()]
)
def test_what_training_rejects_is_rejected_by_name(tmp_path: Path, name: str) -> None:
    root = fill_folder(tmp_path / "photos", {"cat": 3, "dog": 3})
    (root / "dog" / name).write_bytes(make_damaged_files()[name])
    split = open_folder(tmp_path, root, validation_fraction=0).splits["train"]
    with raises(DataError, problem=f"cannot decode {root}/dog/{name}: "):
        pixels_of(split, "memory", tmp_path)
    with raises(
        DataError, fix="data.on_error=skip", problem=f"1 image cannot be read or decoded:\n  {root}/dog/{name}: "
    ):
        prepare_folder(tmp_path, root)
    out = prepare_folder(tmp_path, root, on_error="skip")
    records = open_logged(tmp_path, source="tfds", root=str(out), validation_fraction=0).splits["train"]
    assert records.count == 6
    pixels_of(records, "memory", tmp_path, fingerprint="prepared")


def test_a_record_is_named_with_its_file_to_the_last_message(tmp_path: Path) -> None:
    shard = tmp_path / "a.tfrec"
    payloads = [
        serialize_example(encode_noise(i)[: 200 if i == 1 else None], 0, {"filename": f"dog/{i}.jpg"}) for i in range(3)
    ]
    shard.write_bytes(b"".join(map(frame_record, payloads)))
    data = {"source": "tfrecords", "pattern": str(shard), "class_names": ("dog", "cat"), "validation_fraction": 0}
    with raises(DataError, problem="no training example of cat"):
        open_logged(tmp_path, **data)
    shard.write_bytes(shard.read_bytes() + frame_record(serialize_example(encode_noise(9), 1)))
    split = open_logged(tmp_path, **data).splits["train"]
    with raises(DataError, problem=rf"cannot decode {shard}#1 \(dog/1.jpg\): "):
        pixels_of(split, "memory", tmp_path)
    notes: list[str] = []
    pixels_of(split, "memory", tmp_path, notes, on_error="skip", fingerprint="x")
    assert [n for n in notes if n.startswith(f"skipped {shard}#1 (dog/1.jpg): ")]


@pytest.mark.parametrize(
    ("largest", "more"), [(4095, "; their largest value is 4,095 of 65,535, so they become 0..15"), (65535, "")]
)
def test_pixels_of_12_bits_are_noted(tmp_path: Path, largest: int, more: str) -> None:
    root = fill_folder(tmp_path / "scans", {"cat": 2, "dog": 2})
    for number in range(3):
        pixels = np.linspace(0, largest, 100).astype(np.uint16).reshape(10, 10)
        Image.fromarray(pixels).save(root / "cat" / f"{number}.png")
    (note,) = [n for n in open_folder(tmp_path, root, validation_fraction=0).notes if "16 bits" in n]
    line = "3 of 7 training images are PNGs with 16 bits per channel, of which the upper 8 are used"
    assert note.startswith(line + more)
    assert (note == line) == (not more)
    out = prepare_folder(tmp_path, root)
    notes = open_logged(tmp_path, source="tfds", root=str(out), validation_fraction=0).notes
    assert note in notes


def test_the_pixels_of_a_sample_are_those_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.examine.MAX_EXAMINED_FILES", 2)  # the first and the last file
    root = fill_folder(tmp_path / "scans", {"cat": 2, "dog": 4})
    last = Path(open_folder(tmp_path, root, validation_fraction=0).splits["train"].files[-1])
    Image.fromarray(np.full((10, 10), 4095, np.uint16)).save(last, "PNG")
    (note,) = [n for n in open_folder(tmp_path, root, validation_fraction=0).notes if "16 bits" in n]
    assert note.startswith("1 of 2 examined training images are PNGs with 16 bits")
    assert "their largest value is 4,095" in note


def make_labelled_images(count: int = 8) -> LabeledImages:
    """Images of 4 kB."""
    noise = np.random.default_rng(1).integers(0, 255, (count, 36, 36, 3), np.uint8)
    images = [io.BytesIO() for _ in range(count)]
    for file, pixels in zip(images, noise, strict=True):
        Image.fromarray(pixels).save(file, "PNG")
    return LabeledImages("x", ("a",), {"train": [(file.getvalue(), 0) for file in images]})


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_that_do_not_fit_on_the_disk_leave_nothing(tmp_path: Path, workers: int) -> None:
    options = WriteOptions(shards=2, workers=workers, verify=False)
    with small_disk(tmp_path / "disk", "1m") as disk:
        fill(disk, leave=8192)
        for _ in range(3):
            with pytest.raises(OSError, match="No space left"):
                write_dataset(disk / "out", make_labelled_images(), options)
            # The threads end after the error.
            wait_until(lambda: not any(is_temporary_name(file.name) for file in (disk / "out").iterdir()))
        (disk / "filler").unlink()
        assert write_dataset(disk / "out", make_labelled_images(2), options)


def start_and_end_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.mark.parametrize("alone", [False, True])
def test_old_temporary_files_of_killed_preparations_are_deleted(tmp_path: Path, alone: bool) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    shard = "x-train.tfrecord-00000-of-00001"
    files = {f".{shard}.1.tmp": False, f".{shard}.2.tmp": True, ".x.1-000000000000001": False}
    left = f".{shard}{make_temporary_suffix(start_and_end_process())}"
    files[left] = not alone  # another pod's, if there are several
    for name in files:
        (scratch / name).touch()
        if not name.endswith(".2.tmp") and name != left:
            os.utime(scratch / name, (1e9, 1e9))
    DatasetFolder(storage_path(scratch), None).create({shard}, alone)
    assert {name: (scratch / name).exists() for name in files} == files
