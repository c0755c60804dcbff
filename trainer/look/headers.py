"""Read the headers of encoded images: format, size, color mode, EXIF orientation, and a digest of copies."""

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
from trainer.data.splits import take
from trainer.errors import DataError
from trainer.monitoring.health import health
from trainer.storage.shard_cache import ShardCache
from trainer.types import Split

_HEAD_BYTES = 2**16  # bytes read of a file; the EXIF data of a photo begin there
_READ_BYTES = 1 << 20
_THREADS = 16  # on a network disk each file costs a round trip
_READER = "headers"  # name for the shard cache
_MODES = {
    "1": "bilevel", "L": "gray", "LA": "gray with alpha", "RGB": "RGB", "RGBA": "RGB with alpha", "P": "palette",
    "PA": "palette with alpha", "CMYK": "CMYK",
}  # fmt: skip
_PNG_MODES = {0: "gray", 2: "RGB", 4: "gray with alpha", 6: "RGB with alpha"}  # by color type
_MAX_TEXT_BYTES = 100  # of a field that may name a group


@dataclass(frozen=True)
class Header:
    """What the header of an encoded image states. `format` is "" if Pillow cannot read it."""

    size: int  # bytes
    format: str = ""  # as Pillow names it, such as JPEG
    mode: str = ""  # such as RGB, gray, CMYK, 16-bit gray
    width: int = 0  # in pixels, as it is stored
    height: int = 0
    orientation: int = 1  # EXIF
    digest: str = ""  # of all bytes; "" if no other image has this size in bytes


@dataclass
class Headers:
    """The headers of the examined images of a split, and the distinct values of the other fields of records."""

    by_index: dict[int, Header] = field(default_factory=dict)
    fields: dict[str, Counter[bytes | int]] = field(default_factory=lambda: defaultdict(Counter))


def parse_header(head: bytes, size: int, content: BinaryIO) -> Header:
    """Parse the header of an encoded image of `size` bytes that begins with `head`; read more of `content` if needed.

    No pixel is decoded. Of an image that Pillow cannot identify, only size and orientation are known.
    """
    from PIL import Image

    orientation = parse_orientation(head)
    try:
        with Image.open(content) as image:
            mode = image.mode
            if mode in ("P", "L", "RGB") and "transparency" in image.info:
                mode = {"P": "PA", "L": "LA", "RGB": "RGBA"}[mode]
            if head[:4] == b"\x89PNG" and head[24:25] == b"\x10":
                name = f"16-bit {_PNG_MODES.get(head[25], mode)}"
            else:
                name = "16-bit gray" if mode.startswith("I") else _MODES.get(mode, mode)
            return Header(size, image.format or "", name, *image.size, orientation)
    except Exception:  # corrupt images raise many types; the decoder reports why
        return Header(size, orientation=orientation)


def _digest(chunks: Iterator[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _read_chunks(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(_READ_BYTES):
            yield chunk


def _read_file_header(path: str) -> Header | None:
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD_BYTES)
            file.seek(0)
            return parse_header(head, os.fstat(file.fileno()).st_size, file)
    except OSError:  # reported when it is decoded
        return None


def _read_record_headers(split: Split, indices: np.ndarray, shards: ShardCache | None) -> Headers:
    """Read the headers of these records, and the values of their other fields."""
    result, chosen, position = Headers(), take(split, indices), 0
    for path, members in groupby(chosen.shards, lambda shard: shard.path):
        if shards:
            shards.require(_READER, [os.path.basename(path)])
        records = [record for shard in members for record in range(shard.start, shard.stop)]
        expected = dict(zip(records, indices[position : position + len(records)].tolist(), strict=True))
        position += len(records)
        try:
            for record, _, example, fault in read_examples(path, index_shard(path), records):
                health.record_progress()
                if fault:
                    continue
                for name, value in example.features.feature.items():
                    values = [*value.bytes_list.value, *value.int64_list.value]
                    if name == split.image_field:
                        if len(value.bytes_list.value) == 1:
                            data = values[0]
                            header = parse_header(data[:_HEAD_BYTES], len(data), io.BytesIO(data))
                            result.by_index[expected[record]] = replace(header, digest=_digest(iter([data])))
                    elif len(values) == 1 and not (isinstance(values[0], bytes) and len(values[0]) > _MAX_TEXT_BYTES):
                        result.fields[name][values[0]] += 1
        except (OSError, DataError, IndexError):  # a shard that is truncated; reported when it is decoded
            continue
    if shards:
        shards.release(_READER)
    return result


def _read_file_headers(split: Split, indices: np.ndarray) -> Headers:
    def read(index: int) -> Header | None:
        health.record_progress()
        return _read_file_header(split.files[index])

    with ThreadPoolExecutor(_THREADS) as pool:
        headers = dict(zip(indices.tolist(), pool.map(read, indices.tolist()), strict=True))
    return Headers({index: header for index, header in headers.items() if header})


def read_headers(split: Split, indices: np.ndarray, shards: ShardCache | None = None) -> Headers:
    """Read the headers of the examples `indices`, increasing; those that cannot be read are left out.

    `shards` fetches the shards of a bucket, None if all are local.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about corrupt EXIF data and large images
        return _read_record_headers(split, indices, shards) if split.shards else _read_file_headers(split, indices)


def add_digests(headers: Mapping[str, Headers], splits: Mapping[str, Split]) -> None:
    """Add the digest of each image file that has the same size in bytes as another one."""
    sizes = Counter(header.size for each in headers.values() for header in each.by_index.values())
    repeated = [
        (name, index, splits[name].files[index])
        for name, each in headers.items()
        for index, header in each.by_index.items()
        if splits[name].files and sizes[header.size] > 1
    ]

    def digest(path: str) -> str:
        health.record_progress()
        try:
            return _digest(_read_chunks(path))
        except OSError:
            return ""

    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(digest, [path for _, _, path in repeated])
    for (name, index, _), value in zip(repeated, digests, strict=True):
        headers[name].by_index[index] = replace(headers[name].by_index[index], digest=value)


def group_copies(headers: Mapping[str, Headers]) -> list[list[tuple[str, int]]]:
    """Return the groups of examples, as split and index, whose images are equal byte for byte."""
    members: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for name, each in headers.items():
        for index, header in each.by_index.items():
            if header.digest:
                members[header.digest].append((name, index))
    return [group for group in members.values() if len(group) > 1]
