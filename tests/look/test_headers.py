"""Headers of encoded images, and copies."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.splits_on_disk import write_file_split, write_shard_split
from tests.look.photos import encode_16_bit_png, encode_image, make_smooth_image
from trainer.look.headers import Header, add_digests, group_copies, parse_header, read_headers

ALPHA = make_smooth_image(1)
ALPHA.putalpha(128)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encode_image(make_smooth_image(1)), ("JPEG", "RGB", 120, 80, 1)),
        (encode_image(make_smooth_image(1), orientation=6), ("JPEG", "RGB", 120, 80, 6)),
        (encode_image(make_smooth_image(1).convert("L")), ("JPEG", "gray", 120, 80, 1)),
        (encode_image(make_smooth_image(1).convert("CMYK")), ("JPEG", "CMYK", 120, 80, 1)),
        (encode_image(ALPHA, "PNG", orientation=3), ("PNG", "RGB with alpha", 120, 80, 3)),
        (encode_image(make_smooth_image(1).convert("P"), "PNG"), ("PNG", "palette", 120, 80, 1)),
        (encode_image(Image.new("I;16", (9, 7)), "PNG"), ("PNG", "16-bit gray", 9, 7, 1)),
        (encode_16_bit_png(9, 7), ("PNG", "16-bit RGB", 9, 7, 1)),
        (encode_image(make_smooth_image(1).convert("1"), "PNG"), ("PNG", "bilevel", 120, 80, 1)),
        (encode_image(make_smooth_image(1), "GIF"), ("GIF", "palette", 120, 80, 1)),
        (encode_image(make_smooth_image(1), "BMP"), ("BMP", "RGB", 120, 80, 1)),
        (encode_image(ALPHA, "WEBP"), ("WEBP", "RGB with alpha", 120, 80, 1)),
        (encode_image(make_smooth_image(1), "TIFF"), ("TIFF", "RGB", 120, 80, 1)),
        (b"not an image", ("", "", 0, 0, 1)),
        (b"", ("", "", 0, 0, 1)),
    ],
)
def test_the_header_of_each_format(data: bytes, expected: tuple[str, str, int, int, int]) -> None:
    header = parse_header(data[: 1 << 16], len(data), io.BytesIO(data))
    assert header == Header(len(data), *expected)


def test_records_and_files_have_the_same_headers_and_only_copies_a_common_digest(tmp_path: Path) -> None:
    files, records = write_file_split(tmp_path / "files"), write_shard_split(tmp_path / "shards")
    indices = np.arange(1, files.count, 3)
    one, other = read_headers(files, indices), read_headers(records, indices)
    assert list(one.by_index) == list(other.by_index) == indices.tolist()
    assert {h.format for h in one.by_index.values()} == {"JPEG"}
    sides = [[(h.format, h.size, h.width, h.height) for h in each.by_index.values()] for each in (one, other)]
    assert sides[0] == sides[1]
    headers = {"train": one, "validation": other}
    add_digests(headers, {"train": files, "validation": records})
    assert group_copies(headers) == [[("train", i), ("validation", i)] for i in indices.tolist()]


def test_a_missing_file_and_a_truncated_shard_are_left_out(tmp_path: Path) -> None:
    files, records = write_file_split(tmp_path / "files"), write_shard_split(tmp_path / "shards")
    Path(files.files[3]).unlink()
    assert list(read_headers(files, np.arange(5)).by_index) == [0, 1, 2, 4]
    shard = Path(records.shards[0].path)
    shard.write_bytes(shard.read_bytes()[:-100])  # ends inside of record 8 of 9
    assert list(read_headers(records, np.arange(12)).by_index) == [*range(8), 9, 10, 11]
