"""TFRecord files: finding, checking, reading and framing records. Nothing here imports TensorFlow.

The frame of a record (https://www.tensorflow.org/tutorials/load_data/tfrecord): uint64 length, masked CRC32C of the
length, the payload, masked CRC32C of the payload, all little-endian. The payload is a serialized `tf.train.Example`.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from trainer.errors import DataError

HEADER, FOOTER = 12, 4  # bytes around a payload


class RecordAt(NamedTuple):
    """One record of a shard: where its payload lies, and the feature that holds the encoded image."""

    path: str
    number: int  # of the record in its shard, from 0
    offset: int  # bytes
    length: int  # bytes
    image_field: str

    @property
    def name(self) -> str:
        return f"{self.path}#{self.number}"


@dataclass(frozen=True)
class ShardIndex:
    """Where the payloads of one TFRecord file lie."""

    offsets: np.ndarray  # int64 [n], bytes
    lengths: np.ndarray  # int64 [n], bytes
    fault: str | None  # why the file cannot be read beyond record n - 1

    @property
    def count(self) -> int:
        return len(self.offsets)


def masked_crc(data: bytes) -> int:
    """CRC32C, rotated right by 15 bits plus a constant, as TFRecord stores it."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def frame(payload: bytes) -> tuple[bytes, bytes]:
    """What stands before and after a payload."""
    length = struct.pack("<Q", len(payload))
    return length + struct.pack("<I", masked_crc(length)), struct.pack("<I", masked_crc(payload))


def index_shard(path: str | Path) -> ShardIndex:
    """Walk the length headers of a TFRecord file (about a million records a second).

    A file that ends inside a record is not an error here: `fault` says so and the records before it are indexed.

    Raises:
        DataError: the file is missing, unreadable, compressed, or no TFRecord file.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            if size == 0:
                return ShardIndex(np.zeros(0, np.int64), np.zeros(0, np.int64), None)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _walk(str(path), data, size)
    except OSError as error:
        raise DataError(f"shard {path} cannot be read: {error.strerror}") from None


def _walk(path: str, data: mmap.mmap, size: int) -> ShardIndex:
    offsets: list[int] = []
    lengths: list[int] = []
    at, fault = 0, None
    again = "fetch or write it again, or set data.on_error=skip to use the records before it"
    while at < size:
        header = data[at : at + HEADER]
        if len(header) == HEADER:
            length, crc = struct.unpack("<QI", header)
            if crc != masked_crc(header[:8]):
                if at == 0:
                    kind = "is gzip-compressed" if header[:2] == b"\x1f\x8b" else "is no TFRecord file"
                    raise DataError(f"shard {path} {kind}; uncompressed TFRecord files of tf.train.Example are read")
                fault = f"shard {path} is damaged at the head of record {len(offsets)}: {again}"
                break
            end = at + HEADER + length + FOOTER
        else:
            end = at + HEADER
        if end > size:
            fault = (
                f"shard {path} is truncated: it ends inside record {len(offsets)}, {end - size} bytes early; {again}"
            )
            break
        offsets.append(at + HEADER)
        lengths.append(length)
        at = end
    return ShardIndex(np.array(offsets, np.int64), np.array(lengths, np.int64), fault)


def count_records(path: str | Path) -> int:
    """The number of records of a TFRecord file, from its length headers alone.

    Raises:
        DataError: the file is missing, no TFRecord file, or truncated; the message names the shard and the record.
    """
    index = index_shard(path)
    if index.fault:
        raise DataError(index.fault)
    return index.count


@cache
def example_class() -> Any:
    """`tf.train.Example`, declared here (tensorflow/core/example/{example,feature}.proto).

    The processes that write shards would otherwise spend eight seconds each on importing TensorFlow.
    """
    types = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="kubetune_example.proto", package="kubetune", syntax="proto3")

    def message(name: str, parent: Any = file.message_type) -> Any:
        return parent.add(name=name)

    def field(
        owner: Any, name: str, number: int, kind: int, many: bool = False, of: str = "", choice: bool = False
    ) -> None:
        label = types.LABEL_REPEATED if many else types.LABEL_OPTIONAL
        added = owner.field.add(name=name, number=number, type=kind, label=label)
        if of:
            added.type_name = f".kubetune.{of}"
        if choice:
            added.oneof_index = 0

    for name, kind in (("Bytes", types.TYPE_BYTES), ("Float", types.TYPE_FLOAT), ("Int64", types.TYPE_INT64)):
        field(message(f"{name}List"), "value", 1, kind, many=True)
    feature = message("Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(("Bytes", "Float", "Int64"), start=1):
        field(feature, f"{name.lower()}_list", number, types.TYPE_MESSAGE, of=f"{name}List", choice=True)
    features = message("Features")
    entry = message("FeatureEntry", features.nested_type)
    entry.options.map_entry = True
    field(entry, "key", 1, types.TYPE_STRING)
    field(entry, "value", 2, types.TYPE_MESSAGE, of="Feature")
    field(features, "feature", 1, types.TYPE_MESSAGE, many=True, of="Features.FeatureEntry")
    field(message("Example"), "features", 1, types.TYPE_MESSAGE, of="Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("kubetune.Example"))


def serialize(image: bytes, label: int, texts: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """A `tf.train.Example` with the features `image` (bytes), `label` (int64), and `texts` by name (bytes)."""
    example = example_class()()
    example.features.feature["image"].bytes_list.value.append(image)
    example.features.feature["label"].int64_list.value.append(label)
    for name, text in texts.items():
        example.features.feature[name].bytes_list.value.append(text.encode())
    return example.SerializeToString(deterministic=True)


_KINDS = {"bytes_list": "bytes", "float_list": "float", "int64_list": "int64", None: "empty"}


def fields_of(example: Any) -> str:
    """What an Example holds: "image (bytes), label (int64)"."""
    found = {name: _KINDS[value.WhichOneof("kind")] for name, value in example.features.feature.items()}
    return ", ".join(f"{name} ({kind})" for name, kind in sorted(found.items())) or "no fields"


def _parse(payload: bytes, crc: bytes) -> Any:
    """The Example of a record, or None where it is damaged."""
    if struct.pack("<I", masked_crc(payload)) != crc:
        return None
    try:
        return example_class().FromString(payload)
    except Exception:  # protobuf's DecodeError; what else broken bytes raise is no concern of ours
        return None


def read_image(record: RecordAt) -> bytes:
    """The encoded image of one record.

    Raises:
        DataError: the record is damaged or has no such bytes feature.
    """
    with open(record.path, "rb") as file:
        file.seek(record.offset)
        payload, crc = file.read(record.length), file.read(FOOTER)
    example = _parse(payload, crc)
    if example is None:
        raise DataError(f"{record.name} is damaged")
    value = example.features.feature.get(record.image_field)
    if value is None or len(value.bytes_list.value) != 1:
        raise DataError(
            f"{record.name} has no image bytes in the field {record.image_field!r}; it has {fields_of(example)}: "
            "set data.image_field"
        )
    return value.bytes_list.value[0]


def read_labels(
    path: str, index: ShardIndex, label_field: str, image_field: str, classes: int
) -> tuple[np.ndarray, list[str]]:
    """The label of every record of a shard, each record's checksum verified on the way.

    Returns:
        int32 [n], -1 where a record is damaged; and one sentence for each damaged record.

    Raises:
        DataError: a record has no such label, one that is no integer, or one outside 0..classes-1; or no image.
            The message names the field, the shard, the record, and the fields that there are.
    """
    labels = np.full(index.count, -1, np.int32)
    faults: list[str] = []
    if not index.count:
        return labels, faults
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for number, (offset, length) in enumerate(zip(index.offsets.tolist(), index.lengths.tolist(), strict=True)):
            end = offset + length
            example = _parse(data[offset:end], data[end : end + FOOTER])
            if example is None:
                faults.append(f"record {number} of shard {path} is damaged (its checksum does not fit)")
                continue
            features = example.features.feature
            where = f"record {number} of shard {path}"
            if label_field not in features:
                raise DataError(
                    f"{where} has no field {label_field!r}; it has {fields_of(example)}: set data.label_field"
                )
            values = features[label_field].int64_list.value
            if len(values) != 1:
                raise DataError(
                    f"the label field {label_field!r} of {where} is not one int64; it has {fields_of(example)}: "
                    "set data.label_field"
                )
            if image_field not in features or features[image_field].WhichOneof("kind") != "bytes_list":
                raise DataError(
                    f"{where} has no image bytes in the field {image_field!r}; it has {fields_of(example)}: "
                    "set data.image_field"
                )
            if not 0 <= values[0] < classes:
                raise DataError(
                    f"the label {values[0]} in the field {label_field!r} of {where} is outside 0..{classes - 1}: "
                    f"there are {classes} class names"
                )
            labels[number] = values[0]
    return labels, faults
