"""Read the headers of encoded images (format, size, color mode, EXIF orientation), and detect exact copies."""

import hashlib
import io
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import BinaryIO

import numpy as np

from trainer.data.examine import parse_orientation
from trainer.data.records import index_shard, read_examples
from trainer.data.splits import select_examples
from trainer.errors import DataError
from trainer.monitoring.health import health
from trainer.storage.shard_cache import ShardCache
from trainer.types import Split

_HEAD_BYTES = 2**16  # number of bytes at the start of a file in which the EXIF orientation is searched for
_READ_BYTES = 1 << 20  # chunk size to read complete files
_THREADS = 16  # for files on a network disk, where opening one takes a round trip
_READER = "headers"  # name of this reader in the shard cache
# Pillow's mode -> name on the page.
_MODES = {
    "1": "bilevel", "L": "gray", "LA": "gray with alpha", "RGB": "RGB", "RGBA": "RGB with alpha", "P": "palette",
    "PA": "palette with alpha", "CMYK": "CMYK",
}  # fmt: skip
_PNG_MODES = {0: "gray", 2: "RGB", 4: "gray with alpha", 6: "RGB with alpha"}  # by the color type in a PNG header
_MAX_TEXT_BYTES = 100  # fields of records with longer values cannot be groups


@dataclass(frozen=True)
class Header:
    """The header of an encoded image. If Pillow cannot identify the image, only `size` and `orientation` are set."""

    size: int  # size of the encoded image in bytes
    format: str = ""  # Pillow's name, such as JPEG
    mode: str = ""  # color mode on the page, such as RGB, gray, CMYK, 16-bit gray
    width: int = 0  # pixels, as stored, without the EXIF orientation
    height: int = 0
    orientation: int = 1  # EXIF orientation, 1 (upright) to 8
    digest: str = ""  # hash of all bytes; "" for a file if no other file has the same size


@dataclass
class Headers:
    """The headers of the examined images of a split, and the values of the other fields of its records."""

    by_index: dict[int, Header] = field(default_factory=dict)  # by example index
    # Name of a field -> value -> number of examined records. Only for fields with a single integer or short text.
    fields: dict[str, Counter[bytes | int]] = field(default_factory=lambda: defaultdict(Counter))


def parse_header(head: bytes, size: int, content: BinaryIO) -> Header:
    """Parse the header of an encoded image without decoding its pixels.

    Args:
        head: the first bytes of the image, for the EXIF orientation.
        size: size of the image in bytes.
        content: the image, from its beginning; Pillow reads as much as it needs.

    Returns:
        The header. If Pillow cannot identify the image, it has only `size` and `orientation`.
    """
    from PIL import Image

    orientation = parse_orientation(head)
    try:
        with Image.open(content) as image:
            mode = image.mode
            if mode in ("P", "L", "RGB") and "transparency" in image.info:
                mode = {"P": "PA", "L": "LA", "RGB": "RGBA"}[mode]
            if head[:4] == b"\x89PNG" and head[24:25] == b"\x10":
                mode_name = f"16-bit {_PNG_MODES.get(head[25], mode)}"
            else:
                mode_name = "16-bit gray" if mode.startswith("I") else _MODES.get(mode, mode)
            return Header(size, image.format or "", mode_name, *image.size, orientation)
    except Exception:  # corrupt images raise errors of many types; the reason is reported when the image is decoded
        return Header(size, orientation=orientation)


def _digest(chunks: Iterator[bytes]) -> str:
    """Hash the content that `chunks` yields, 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _read_chunks(path: str) -> Iterator[bytes]:
    """Yield the content of a file in chunks of `_READ_BYTES`."""
    with open(path, "rb") as file:
        while chunk := file.read(_READ_BYTES):
            yield chunk


def _read_file_header(path: str) -> Header | None:
    """Read the header of an image file. Return None if the file cannot be read."""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD_BYTES)
            file.seek(0)
            return parse_header(head, os.fstat(file.fileno()).st_size, file)
    except OSError:  # reported when the image is decoded
        return None


def _read_record_headers(split: Split, indices: np.ndarray, shards: ShardCache | None) -> Headers:
    """Read the headers of records, and the values of their other fields."""
    result = Headers()
    selected_split = select_examples(split, indices)
    position = 0
    for path, ranges in groupby(selected_split.shards, lambda shard: shard.path):
        if shards:
            shards.require(_READER, [os.path.basename(path)])
        records = [record for shard in ranges for record in range(shard.start, shard.stop)]
        index_of = dict(zip(records, indices[position : position + len(records)].tolist(), strict=True))
        position += len(records)
        try:
            for record, _, example, error in read_examples(path, index_shard(path), records):
                health.record_progress()
                if error:
                    continue
                for name, value in example.features.feature.items():
                    values = [*value.bytes_list.value, *value.int64_list.value]
                    if name == split.image_field:
                        if len(value.bytes_list.value) == 1:
                            image = values[0]
                            header = parse_header(image[:_HEAD_BYTES], len(image), io.BytesIO(image))
                            result.by_index[index_of[record]] = replace(header, digest=_digest(iter([image])))
                    elif len(values) == 1 and not (isinstance(values[0], bytes) and len(values[0]) > _MAX_TEXT_BYTES):
                        result.fields[name][values[0]] += 1
        except (OSError, DataError, IndexError):  # a truncated shard is reported when its images are decoded
            continue
    if shards:
        shards.release(_READER)
    return result


def _read_file_headers(split: Split, indices: np.ndarray) -> Headers:
    """Read the headers of image files, in several threads."""

    def read(index: int) -> Header | None:
        health.record_progress()
        return _read_file_header(split.files[index])

    with ThreadPoolExecutor(_THREADS) as pool:
        headers = dict(zip(indices.tolist(), pool.map(read, indices.tolist()), strict=True))
    return Headers({index: header for index, header in headers.items() if header})


def read_headers(split: Split, indices: np.ndarray, shards: ShardCache | None = None) -> Headers:
    """Read the headers of some examples of a split. Examples that cannot be read are left out.

    Args:
        indices: example indices, int64 [k], increasing.
        shards: fetches the shards from a bucket; None if they are local.

    Raises:
        Interrupted: the bucket does not respond.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about corrupt EXIF data and large images
        return _read_record_headers(split, indices, shards) if split.shards else _read_file_headers(split, indices)


def add_digests(headers: Mapping[str, Headers], splits: Mapping[str, Split]) -> None:
    """Set the digest of each image file that has the same size as another one, as only such files can be copies."""
    sizes = Counter(header.size for split_headers in headers.values() for header in split_headers.by_index.values())
    same_size = [
        (name, index, splits[name].files[index])
        for name, split_headers in headers.items()
        for index, header in split_headers.by_index.items()
        if splits[name].files and sizes[header.size] > 1
    ]

    def digest(path: str) -> str:
        health.record_progress()
        try:
            return _digest(_read_chunks(path))
        except OSError:
            return ""

    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(digest, [path for _, _, path in same_size])
    for (name, index, _), value in zip(same_size, digests, strict=True):
        headers[name].by_index[index] = replace(headers[name].by_index[index], digest=value)


def group_copies(headers: Mapping[str, Headers]) -> list[list[tuple[str, int]]]:
    """Return the groups of two or more examples, as (split, index), whose images are equal byte for byte."""
    groups: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for name, split_headers in headers.items():
        for index, header in split_headers.by_index.items():
            if header.digest:
                groups[header.digest].append((name, index))
    return [group for group in groups.values() if len(group) > 1]
