"""EXIF orientation: read from encoded images, and applied in decoding, caches, exports and notes."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from tests.data.images import fill_folder
from tests.data.splits_on_disk import open_pixels
from tests.data.test_decoding import assert_saved_decodes_as_mapped, encode_image, make_smooth_image
from tests.data.test_open import open_folder
from trainer.data import examine
from trainer.data.decoding import decode_image
from trainer.data.images import build_cache_name
from trainer.data.orientation import extract_exif, parse_orientation
from trainer.types import Split

ORIENTATIONS = range(1, 9)


def encode_photo(orientation: int, kind: str = "JPEG", pixels: np.ndarray | None = None, first: bytes = b"") -> bytes:
    """A photo with an EXIF orientation; `first` is a segment that precedes the EXIF data of a JPEG."""
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x010F], exif[0x0112], exif[0x0131] = "Maker", orientation, "Software"
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    Image.fromarray(make_smooth_image(61, 100) if pixels is None else pixels).save(out, kind, exif=exif, **options)
    data = out.getvalue()
    return data[:2] + first + data[2:]


def turn_upright(data: bytes) -> bytes:
    """The same image as Pillow turns it, as a PNG."""
    out = io.BytesIO()
    ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB").save(out, "PNG")
    return out.getvalue()


def decode(data: bytes, size: int = 48, resize: str = "stretch", orientation: str = "exif") -> np.ndarray:
    return decode_image(tf.constant(data), size, resize, orientation).numpy().astype(int)  # type: ignore[arg-type]


@pytest.mark.parametrize("resize", ["stretch", "crop"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize(("kind", "limit"), [("JPEG", 8), ("PNG", 0), ("WEBP", 0)])
def test_images_are_decoded_as_pillow_turns_them(kind: str, limit: int, orientation: int, resize: str) -> None:
    data = encode_photo(orientation, kind)
    assert np.abs(decode(data, resize=resize) - decode(turn_upright(data), resize=resize)).max() <= limit
    stored = encode_image(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), "PNG")
    assert np.abs(decode(data, 48, resize, "ignore") - decode(stored, resize=resize)).max() <= limit


@pytest.mark.parametrize("length", [73, 77, 329, 333, 18_694, 18_761, 19_789])
def test_the_length_of_the_exif_data_of_a_webp_may_have_the_bytes_of_their_first_letters(length: int) -> None:
    data = encode_photo(6, "WEBP")
    content = data[data.index(b"EXIF") + 8 :]
    longer = data[: data.index(b"EXIF") + 4] + struct.pack("<I", length) + content.ljust(length, b"\0")[:length]
    longer += b"\0" * (length % 2)
    longer = longer[:4] + struct.pack("<I", len(longer) - 8) + longer[8:]
    with Image.open(io.BytesIO(longer)) as image:
        assert image.getexif()[0x0112] == 6
    assert np.array_equal(decode(longer), decode(turn_upright(data)))


@pytest.mark.parametrize(("size", "ratio"), [(25, 8), (50, 4), (100, 2)])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_large_photo_is_turned_at_every_scale(orientation: int, size: int, ratio: int) -> None:
    data = encode_photo(orientation, pixels=make_smooth_image(203, 301))
    small = tf.io.decode_jpeg(data, channels=3, ratio=ratio).numpy()
    expected = turn_upright(encode_photo(orientation, "PNG", small))
    np.testing.assert_array_equal(decode(data, size), decode(expected, size))
    far = np.abs(decode(data, size, "crop") - decode(expected, size, "crop"))
    assert far[1:-1, 1:-1].max() == 0  # a crop ends without neighbouring chroma


def make_segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content


def make_tiff(order: str, kind: int, value: bytes) -> bytes:
    """EXIF data with one entry, in the byte order "<" or ">"."""
    entry = struct.pack(f"{order}HHI", 0x0112, kind, 1) + value.ljust(4, b"\0")
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, 1) + entry + bytes(4)


def read_orientation(data: bytes) -> int:
    return int(parse_orientation(tf.strings.reduce_join(extract_exif(tf.constant(data), True))))


@pytest.mark.parametrize(
    ("exif", "expected"),
    [
        (make_tiff("<", 3, b"\x06\0"), 6),
        (make_tiff(">", 3, b"\0\x08"), 8),
        (make_tiff("<", 4, b"\x05\0\0\0"), 5),
        (make_tiff(">", 4, b"\0\0\0\x07"), 7),
        (make_tiff("<", 1, b"\x03"), 1),  # Pillow too ignores a mark of another type
        (make_tiff("<", 3, b"\x09\0"), 1),  # there is no such orientation
        (make_tiff("<", 3, b"\0\0"), 1),
        (make_tiff("<", 3, b"\x06\0")[:15], 1),  # truncated
        (b"II*\0\xff\xff\xff\xff", 1),  # the directory is beyond the end
        (b"MM\0*\0\0\0\x08\xff\xff", 1),
        (b"XX*\0" + make_tiff("<", 3, b"\x06\0")[4:], 1),
        (b"", 1),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged EXIF data
def test_both_byte_orders_and_damaged_exif_data(exif: bytes, expected: int) -> None:
    plain = encode_image(make_smooth_image(20, 30), "JPEG")
    marked = plain[:2] + make_segment(0xE1, b"Exif\0\0" + exif) + plain[2:]
    assert read_orientation(marked) == examine.parse_orientation(marked) == expected
    decode(marked)


def test_exif_data_may_follow_other_segments() -> None:
    for first in (
        make_segment(0xE0, b"JFIF\0" + bytes(9)),
        make_segment(0xE2, bytes(5000)),
        make_segment(0xFE, b"a comment"),
    ):
        assert read_orientation(encode_photo(6, first=first)) == 6
    assert read_orientation(encode_image(make_smooth_image(20, 30), "JPEG")) == 1


def test_a_saved_model_turns_images_as_training_does(tmp_path: Path) -> None:
    images = [encode_photo(orientation, kind) for kind in ("JPEG", "PNG", "WEBP") for orientation in (1, 4, 6)]
    assert_saved_decodes_as_mapped(images, tmp_path)


@pytest.mark.parametrize("cache", ["memory", "disk", "none"])
def test_the_switch_decides_in_every_cache(tmp_path: Path, cache: str) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(encode_photo(6))
    splits = [Split("train", np.zeros(1, np.int32), (str(path),), orientation=o) for o in ("exif", "ignore")]  # type: ignore[arg-type]
    turned, stored = (open_pixels(split, cache, tmp_path, size=20).read_images(np.array([0]))[0] for split in splits)
    np.testing.assert_array_equal(turned, decode(encode_photo(6), 20))
    np.testing.assert_array_equal(stored, decode(encode_photo(6), 20, orientation="ignore"))
    assert not np.array_equal(turned, stored)
    names = {build_cache_name(split, 20, "stretch", "abc") for split in splits}
    assert len(names) == 2  # the cache of features contains this name too


def test_marks_are_counted_when_the_data_is_opened(tmp_path: Path) -> None:
    root = fill_folder(tmp_path / "photos", {"cat": 10, "dog": 10})
    for number, orientation in enumerate((1, 3, 6, 8)):
        (root / "cat" / f"{number:02d}.jpg").write_bytes(encode_photo(orientation))
    (root / "dog" / "00.png").write_bytes(encode_photo(5, "PNG"))
    for value, done in (("exif", "turned upright"), ("ignore", "used as they are stored")):
        dataset = open_folder(tmp_path, root, orientation=value, validation_fraction=0)
        line = f"4 of 21 training images have an EXIF orientation: {done} (data.orientation={value})"
        assert line in dataset.notes
        assert {split.orientation for split in dataset.splits.values()} == {value}
