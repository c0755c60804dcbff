"""TFRecord files: finding, checking, reading and framing records. Nothing here imports TensorFlow.

The frame of a record (https://www.tensorflow.org/tutorials/load_data/tfrecord): uint64 length, masked CRC32C of the
length, the payload, masked CRC32C of the payload, all little-endian. The payload is a serialized `tf.train.Example`.
"""

import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from trainer.errors import DataError
from trainer.types import Split

HEADER, FOOTER = 12, 4  # bytes around a payload
MOST_GROUPS = 100  # more are no groups but names


class RecordAt(NamedTuple):
    """One record of a shard: the position of its payload, and the feature that holds the encoded image."""

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
    """The positions of the payloads in one TFRecord file."""

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
    """The bytes that stand before (12) and after (4) a payload."""
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
        end = at + HEADER
        if len(header) == HEADER:
            length, crc = struct.unpack("<QI", header)
            if crc != masked_crc(header[:8]):
                if at == 0:
                    kind = "is gzip-compressed" if header[:2] == b"\x1f\x8b" else "is no TFRecord file"
                    raise DataError(f"shard {path} {kind}; uncompressed TFRecord files of tf.train.Example are read")
                fault = f"shard {path} is damaged at the head of record {len(offsets)}: {again}"
                break
            end += length + FOOTER
        if end > size:
            cut = f"it ends inside record {len(offsets)}, {end - size} bytes early"
            fault = f"shard {path} is truncated: {cut}; {again}"
            break
        offsets.append(at + HEADER)
        lengths.append(length)
        at = end
    return ShardIndex(np.array(offsets, np.int64), np.array(lengths, np.int64), fault)


def payloads(path: str, index: ShardIndex, numbers: Iterable[int]) -> Iterator[tuple[int, bytes, bytes]]:
    """Number, payload and stored checksum (4 bytes) of these records of a shard."""
    if not index.count:  # an empty file cannot be mapped
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for number in numbers:
            start = int(index.offsets[number])
            end = start + int(index.lengths[number])
            yield number, data[start:end], data[end : end + FOOTER]


@cache
def example_class() -> Any:
    """`tf.train.Example`, declared here (tensorflow/core/example/{example,feature}.proto).

    The processes that write shards would otherwise spend eight seconds each on importing TensorFlow.
    """
    types = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="kubetune_example.proto", package="kubetune", syntax="proto3")

    def field(owner: Any, name: str, number: int, kind: Any, many: bool = False, **of: Any) -> None:
        label = types.LABEL_REPEATED if many else types.LABEL_OPTIONAL
        kind = (
            {"type_name": f".kubetune.{kind}", "type": types.TYPE_MESSAGE} if isinstance(kind, str) else {"type": kind}
        )
        owner.field.add(name=name, number=number, label=label, **kind, **of)

    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    kinds = {"Bytes": types.TYPE_BYTES, "Float": types.TYPE_FLOAT, "Int64": types.TYPE_INT64}
    for number, (name, kind) in enumerate(kinds.items(), start=1):
        field(file.message_type.add(name=f"{name}List"), "value", 1, kind, many=True)
        field(feature, f"{name.lower()}_list", number, f"{name}List", oneof_index=0)
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry", options=descriptor_pb2.MessageOptions(map_entry=True))
    field(entry, "key", 1, types.TYPE_STRING)
    field(entry, "value", 2, "Feature")
    field(features, "feature", 1, "Features.FeatureEntry", many=True)
    field(file.message_type.add(name="Example"), "features", 1, "Features")
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
    """The fields of an Example as text: "image (bytes), label (int64)"."""
    kinds = {name: _KINDS[value.WhichOneof("kind")] for name, value in example.features.feature.items()}
    return ", ".join(f"{name} ({kind})" for name, kind in sorted(kinds.items())) or "no fields"


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
        raise _no_image(record.name, record.image_field, example)
    return value.bytes_list.value[0]


def _no_image(where: str, field: str, example: Any) -> DataError:
    fields = f"it has {fields_of(example)}: set data.image_field"
    return DataError(f"{where} has no image bytes in the field {field!r}; {fields}")


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
    for number, payload, crc in payloads(path, index, range(index.count)):
        where = f"record {number} of shard {path}"
        example = _parse(payload, crc)
        if example is None:
            faults.append(f"{where} is damaged (its checksum does not fit)")
            continue
        features, advice = example.features.feature, "set data.label_field"
        if label_field not in features:
            raise DataError(f"{where} has no field {label_field!r}; it has {fields_of(example)}: {advice}")
        values = features[label_field].int64_list.value
        if len(values) != 1:
            fields = f"is not one int64; it has {fields_of(example)}"
            raise DataError(f"the label field {label_field!r} of {where} {fields}: {advice}")
        if image_field not in features or features[image_field].WhichOneof("kind") != "bytes_list":
            raise _no_image(where, image_field, example)
        if not 0 <= values[0] < classes:
            raise DataError(
                f"the label {values[0]} in the field {label_field!r} of {where} is outside 0..{classes - 1}: "
                f"there are {classes} class names"
            )
        labels[number] = values[0]
    return labels, faults


def read_groups(split: Split, field: str, names: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """The value of `field` for each example of a record split, in the order of the examples.

    Args:
        field: text or whole numbers, one value a record.
        names: what the numbers mean; None: the numbers are the names.

    Raises:
        DataError: a record has no such value, or there are more than 100 different ones.
    """
    groups: list[str] = []
    for shard in split.shards:
        for number, payload, _ in payloads(shard.path, index_shard(shard.path), range(shard.start, shard.stop)):
            example = example_class().FromString(payload)
            groups.append(_group(example, field, names, f"record {number} of shard {shard.path}"))
    values = set(groups)
    if len(values) > MOST_GROUPS:
        raise DataError(
            f"data.group_field={field} has {len(values):,} different values among the {split.count:,} {split.name} "
            f"examples, such as {min(values)!r}; a table of groups takes at most {MOST_GROUPS}: name another field"
        )
    return tuple(groups)


def _group(example: Any, field: str, names: tuple[str, ...] | None, where: str) -> str:
    value = example.features.feature.get(field)
    texts, numbers = (list(value.bytes_list.value), list(value.int64_list.value)) if value else ([], [])
    if len(texts) + len(numbers) != 1:
        raise DataError(
            f"data.group_field={field}: {where} has not one text or whole number there; it has {fields_of(example)}"
        )
    if texts:
        return texts[0].decode("utf-8", "backslashreplace")
    if names is None:
        return str(numbers[0])
    if not 0 <= numbers[0] < len(names):
        raise DataError(f"data.group_field={field}: {where} holds {numbers[0]}, and there are {len(names)} names")
    return names[numbers[0]]
