"""Index, verify, read and write records of TFRecord files, without TensorFlow.

The format of a record (https://www.tensorflow.org/tutorials/load_data/tfrecord): uint64 length, masked CRC32C of the
length, the payload, masked CRC32C of the payload, all little-endian. The payload is a serialized `tf.train.Example`.
"""

import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from trainer.errors import DataError
from trainer.names import escape_unprintable, normalize_class_name
from trainer.types import Shard, Split

HEADER_BYTES, FOOTER_BYTES = 12, 4  # before and after a payload
UNLABELLED = -1  # the label of TFDS for an example that has none
MAX_GROUPS = 100  # distinct values of data.group_field


class RecordLocation(NamedTuple):
    """Location of a record in a shard, and the name of the feature with the encoded image."""

    path: str
    record_index: int  # in the shard
    offset: int  # of the payload, in bytes
    length: int  # of the payload, in bytes
    image_field: str

    @property
    def name(self) -> str:
        return f"{escape_unprintable(self.path)}#{self.record_index}"


@dataclass(frozen=True)
class ShardIndex:
    """Offsets and lengths of the payloads in one TFRecord file."""

    offsets: np.ndarray  # int64 [n], bytes
    lengths: np.ndarray  # int64 [n], bytes
    fault: str | None  # why the file cannot be read beyond record n - 1; None if it is complete

    @property
    def count(self) -> int:
        return len(self.offsets)


def locate_records(split: Split) -> list[RecordLocation]:
    """Locate the records of a split, in the order of its examples. Read the record headers of its shards."""
    index = {path: index_shard(path) for path in {shard.path for shard in split.shards}}
    return [
        RecordLocation(s.path, n, int(index[s.path].offsets[n]), int(index[s.path].lengths[n]), split.image_field)
        for s in split.shards
        for n in range(s.start, s.stop)
    ]


def masked_crc32c(data: bytes) -> int:
    """Compute the checksum that TFRecord stores, which is CRC32C rotated right by 15 bits, plus a constant."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def is_truncated_at(file: Path, start: int) -> bool:
    """Return whether a file of records ends at byte `start`, or in the record that begins there."""
    with open(file, "rb") as content:
        content.seek(start)
        header, rest = content.read(HEADER_BYTES), file.stat().st_size - start
    if len(header) < HEADER_BYTES:
        return True
    length, crc = struct.unpack("<QI", header)
    return crc == masked_crc32c(header[:8]) and rest < HEADER_BYTES + length + FOOTER_BYTES


def frame_record(payload: bytes) -> bytes:
    """Return the bytes of one record: header, payload and footer."""
    length = struct.pack("<Q", len(payload))
    return length + struct.pack("<I", masked_crc32c(length)) + payload + struct.pack("<I", masked_crc32c(payload))


def unreadable_error(path: str | Path, error: OSError) -> DataError:
    """Build the error for a file that the operating system cannot read."""
    problem = f"{escape_unprintable(str(path))} cannot be read: {error.strerror}"
    return DataError(problem, fix="check that it exists and its permissions")


def join_first(items: Sequence[str], separator: str = ", ") -> str:
    """Join the first five items for a message, followed by the count of the others."""
    more = [f"and {len(items) - 5} more"] if len(items) > 5 else []
    return separator.join([*items[:5], *more])


def index_shard(path: str | Path) -> ShardIndex:
    """Read the record headers of a shard, about a million per second, and return the location of each payload.

    A file that is truncated, or corrupt after its first header, is indexed up to that point. `fault` is the reason.

    Raises:
        DataError: the file is missing, unreadable, compressed, or not a TFRecord file.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            if size == 0:
                return ShardIndex(np.zeros(0, np.int64), np.zeros(0, np.int64), None)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read_headers(escape_unprintable(str(path)), data, size)
    except OSError as error:
        raise unreadable_error(path, error) from None


def _read_headers(path: str, data: mmap.mmap, size: int) -> ShardIndex:
    offsets: list[int] = []
    lengths: list[int] = []
    start, fault = 0, None
    while start < size:
        header = data[start : start + HEADER_BYTES]
        end = start + HEADER_BYTES
        if len(header) == HEADER_BYTES:
            length, crc = struct.unpack("<QI", header)
            if crc != masked_crc32c(header[:8]):
                if start == 0:
                    kind = "is gzip-compressed" if header[:2] == b"\x1f\x8b" else "is not a TFRecord file"
                    fix = "write its tf.train.Example records as an uncompressed TFRecord file"
                    raise DataError(f"shard {path} {kind}", fix=fix)
                fault = f"shard {path} is corrupt at the header of record {len(offsets)}"
                break
            end += length + FOOTER_BYTES
        if end > size:
            fault = f"shard {path} is truncated: it ends inside record {len(offsets)}, {end - size} bytes early"
            break
        offsets.append(start + HEADER_BYTES)
        lengths.append(length)
        start = end
    return ShardIndex(np.array(offsets, np.int64), np.array(lengths, np.int64), fault)


def read_examples(path: str, index: ShardIndex, records: Iterable[int]) -> Iterator[tuple[int, str, Any, str]]:
    """Yield index, name, Example and fault ("" if it is readable) of each of these records of a shard."""
    if not index.count:  # an empty file cannot be mapped
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for record_index in records:
            start = int(index.offsets[record_index])
            end = start + int(index.lengths[record_index])
            example, fault = _parse(data[start:end], data[end : end + FOOTER_BYTES])
            name = f"record {record_index} of shard {escape_unprintable(path)}"
            yield record_index, _with_source(name, example), example, fault


# tensorflow/core/example/{example,feature}.proto; importing them from TensorFlow takes eight seconds per process.
_EXAMPLE_PROTO = """
name: "kubetune_example.proto" package: "kubetune" syntax: "proto3"
message_type { name: "BytesList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "FloatList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT } }
message_type { name: "Int64List" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type { name: "Feature" oneof_decl { name: "kind" }
  field { name: "bytes_list" number: 1 type: TYPE_MESSAGE type_name: ".kubetune.BytesList" oneof_index: 0 }
  field { name: "float_list" number: 2 type: TYPE_MESSAGE type_name: ".kubetune.FloatList" oneof_index: 0 }
  field { name: "int64_list" number: 3 type: TYPE_MESSAGE type_name: ".kubetune.Int64List" oneof_index: 0 } }
message_type { name: "Features"
  field { name: "feature" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE
    type_name: ".kubetune.Features.FeatureEntry" }
  nested_type { name: "FeatureEntry" options { map_entry: true } field { name: "key" number: 1 type: TYPE_STRING }
    field { name: "value" number: 2 type: TYPE_MESSAGE type_name: ".kubetune.Feature" } } }
message_type { name: "Example" field { name: "features" number: 1 type: TYPE_MESSAGE type_name: ".kubetune.Features" } }
"""


@cache
def get_example_class() -> Any:
    """Return the message class of `tf.train.Example`, built without TensorFlow."""
    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(_EXAMPLE_PROTO, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("kubetune.Example"))


def serialize(image: bytes, label: int, texts: Mapping[str, str] | None = None) -> bytes:
    """Serialize a `tf.train.Example` with the features `image`, `label`, and a bytes feature for each of `texts`."""
    example = get_example_class()()
    example.features.feature["image"].bytes_list.value.append(image)
    example.features.feature["label"].int64_list.value.append(label)
    for name, text in (texts or {}).items():
        example.features.feature[name].bytes_list.value.append(text.encode())
    return example.SerializeToString(deterministic=True)


_KINDS = {"bytes_list": "bytes", "float_list": "float", "int64_list": "int64", None: "empty"}


def _escape_text(value: bytes) -> str:
    """Decode a bytes value as UTF-8, with unprintable characters escaped."""
    return escape_unprintable(value.decode("utf-8", "backslashreplace"))


def describe_fields(example: Any) -> str:
    """List the fields of an Example, such as "image (bytes), label (int64)"."""
    kinds = {
        escape_unprintable(name): _KINDS[value.WhichOneof("kind")] for name, value in example.features.feature.items()
    }
    return ", ".join(f"{name} ({kind})" for name, kind in sorted(kinds.items())) or "no fields"


NOT_AN_EXAMPLE = "is not a tf.train.Example, although its checksum matches"


def _parse(payload: bytes, crc: bytes) -> tuple[Any, str]:
    """Verify the checksum of a payload and parse its Example. Return also the fault, "" if there is none."""
    if struct.pack("<I", masked_crc32c(payload)) != crc:
        return None, "is corrupt (checksum mismatch)"
    try:
        example = get_example_class().FromString(payload)
    except Exception:  # protobuf's DecodeError, and other exceptions that arbitrary bytes raise
        return None, NOT_AN_EXAMPLE
    return (example, "") if example.features.feature else (None, f"{NOT_AN_EXAMPLE}: it has no fields")


def _read_example(record: RecordLocation) -> tuple[Any, str]:
    with open(record.path, "rb") as file:
        file.seek(record.offset)
        return _parse(file.read(record.length), file.read(FOOTER_BYTES))


def read_image(record: RecordLocation) -> bytes:
    """Read the encoded image of a record. Raise a DataError if it is corrupt, or the field is not one bytes value."""
    example, fault = _read_example(record)
    if fault:
        raise DataError(f"{record.name} {fault}", fix="fetch or write the shard again, or set data.on_error=skip")
    value = example.features.feature.get(record.image_field)
    if value is None or len(value.bytes_list.value) != 1:
        raise _missing_image_error(_with_source(record.name, example), record.image_field, example)
    return value.bytes_list.value[0]


SOURCE_FIELD = "filename"  # in which `trainer.prepare` stores the name of the image file
_SOURCE_FIELDS = (SOURCE_FIELD, "file_name", "image/filename")  # in records of other programs too


def read_source_name(record: RecordLocation) -> str:
    """Read the file name of the source image from a record, escaped; "" if the record has none or is corrupt."""
    return _get_source_name(_read_example(record)[0])


def read_source_names(split: Split) -> Iterator[str]:
    """Yield the file name that the record of each example of a split stores, escaped; "" for none."""
    for shard in split.shards:
        for _, _, example, _ in read_examples(shard.path, index_shard(shard.path), range(shard.start, shard.stop)):
            yield _get_source_name(example)


def _get_source_name(example: Any) -> str:
    """Return the file name of the source image, escaped; "" if the Example, None if it is corrupt, has none."""
    for field in () if example is None else _SOURCE_FIELDS:
        value = example.features.feature.get(field)
        if value is not None and len(value.bytes_list.value) == 1:
            return _escape_text(value.bytes_list.value[0])
    return ""


def _with_source(record: str, example: Any) -> str:
    """Add the file name of the source image, if the Example has one, to the name of a record."""
    source = _get_source_name(example)
    return f"{record} ({source})" if source else record


def _missing_image_error(record: str, field: str, example: Any) -> DataError:
    problem, fix = (
        f"{record} does not have exactly one bytes value in this field",
        f"set one of {describe_fields(example)}",
    )
    return DataError(problem, key="data.image_field", value=field, fix=fix)


@dataclass(frozen=True)
class LabelFields:
    """Fields of image and label in records, and how to interpret the label."""

    label: str  # name of the field
    image: str  # name of the field
    classes: int
    kind: str = "index"  # data.label_kind
    names: tuple[str, ...] = ()  # class names, normalized by `normalize_class_name`, for labels of the kind "text"


def read_labels(path: str, index: ShardIndex, fields: LabelFields) -> tuple[np.ndarray, list[str]]:
    """Read the label of each record, int32 [n], -1 if it has none or is unreadable, and the faults of such records.

    Raises:
        DataError: a record has no bytes in the image field, or its label is missing, not of the kind `fields.kind`, or
            not one of the classes.
    """
    labels = np.full(index.count, -1, np.int32)
    faults: list[str] = []
    for record_index, record, example, fault in read_examples(path, index, range(index.count)):
        if fault:
            faults.append(f"{record} {fault}")
            continue
        features = example.features.feature
        if fields.label not in features:
            problem, fix = f"{record} has no such field", f"set one of {describe_fields(example)}"
            raise DataError(problem, key="data.label_field", value=fields.label, fix=fix)
        if fields.image not in features or features[fields.image].WhichOneof("kind") != "bytes_list":
            raise _missing_image_error(record, fields.image, example)
        if fields.kind.startswith("index") and list(features[fields.label].int64_list.value) == [UNLABELLED]:
            faults.append(f"{record} {NOT_LABELLED}")
            continue
        labels[record_index] = _parse_label(record, example, fields)
    return labels, faults


NOT_LABELLED = f"is not labelled ({UNLABELLED})"


def label_error(fault: str, field: str) -> DataError:
    """Build the error for a fault of `read_labels`; `field` is data.label_field."""
    if not fault.endswith(NOT_LABELLED):
        fix = "fetch or write it again, or set data.on_error=skip to leave out corrupt records"
        return DataError(fault, fix=fix)
    fix = "leave its split out (tfds: data.validation_split=none, data.test_split=none), or set another field"
    return DataError(fault, key="data.label_field", value=field, fix=f"{fix}, or data.on_error=skip if others have one")


def has_no_labels(shards: Sequence[Shard], label_field: str) -> bool:
    """Return whether every record has the label -1, which TFDS gives to examples that are not labelled.

    Reading ends at the first record that has a label.
    """
    for shard in shards:
        index = index_shard(shard.path)
        for _, _, example, fault in read_examples(shard.path, index, range(shard.start, min(shard.stop, index.count))):
            if not fault and list(example.features.feature[label_field].int64_list.value) != [UNLABELLED]:
                return False
    return bool(shards)


def _parse_label(record: str, example: Any, fields: LabelFields) -> int:
    """Return the zero-based class index of an Example; raise a DataError that describes what it holds instead."""
    feature = example.features.feature[fields.label]
    kind = feature.WhichOneof("kind")
    values: list[Any] = list(getattr(feature, kind).value) if kind else []
    shown = [_escape_text(v) if isinstance(v, bytes) else v for v in values]
    holds = f"{record} holds {_describe_label(shown, fields)}"
    has_one_hot = kind != "bytes_list" and len(values) > 1 and sorted(values) == [0] * (len(values) - 1) + [1]
    is_onehot = has_one_hot and len(values) == fields.classes
    if has_one_hot and not is_onehot:
        problem = f"{holds}, which is one-hot for {len(values)} classes, but there are {fields.classes} class names"
        fix = f"give {len(values)} class names, or set another data.label_field"
        raise DataError(problem, key="data.class_names", fix=fix)
    actual = "onehot" if is_onehot else "text" if kind == "bytes_list" else "index"
    if len(values) != 1 and not is_onehot:
        fix = "keep one label per image, or set another field" if values else f"set one of {describe_fields(example)}"
        problem = f"{holds}, and a classifier needs one label"
        raise DataError(problem, key="data.label_field", value=fields.label, fix=fix)
    if kind == "float_list" and not is_onehot:
        fix = f"write class indices as integers, or set one of {describe_fields(example)}"
        raise DataError(f"{holds}, which is not a class index", key="data.label_field", value=fields.label, fix=fix)
    if actual != fields.kind.removesuffix("1"):
        fix = f"set data.label_kind={actual}, or another data.label_field of {describe_fields(example)}"
        raise DataError(f"{holds}", key="data.label_kind", value=fields.kind, fix=fix)
    if fields.kind == "text":
        name = normalize_class_name(shown[0])
        if name not in fields.names:
            problem = f"{holds}, which is not in data.class_names"
            fix = f"add it to {join_first(fields.names)}, or set another field"
            raise DataError(problem, key="data.label_field", value=fields.label, fix=fix)
        return fields.names.index(name)
    if is_onehot:
        return int(np.argmax(values))
    first = 1 if fields.kind == "index1" else 0
    if not first <= values[0] < first + fields.classes:
        problem = f"the label {values[0]} of {record} is outside {first}..{first + fields.classes - 1}"
        other = "index" if first else "index1"
        counts_otherwise = values[0] == (0 if first else fields.classes)
        hint = f"if labels begin with {1 - first}, set data.label_kind={other}; otherwise " if counts_otherwise else ""
        fix = f"{hint}set another field, or one class name per label instead of {fields.classes}"
        raise DataError(problem, key="data.label_field", value=fields.label, fix=fix)
    return int(values[0]) - first


def _describe_label(values: Sequence[Any], fields: LabelFields) -> str:
    """Describe the values of a label field, such as "the text dog" or "3 labels (1, 4, 5)"."""
    if len(values) == 1:
        kind = {str: "the text", float: "the decimal number", int: "the number"}[type(values[0])]
        return f"{kind} {values[0]}"
    if not values:
        return "no label"
    listed = f"({join_first([f'{v:g}' if isinstance(v, float) else str(v) for v in values])})"
    return f"{len(values)} {'numbers' if len(values) == fields.classes else 'labels'} {listed}"


def read_groups(split: Split, field: str, names: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """Read the group of each example of a split of records, which is one text or whole number in `field`.

    `names` are the names of the numbers 0, 1, ... If None, a number is its own name.

    Raises:
        DataError: a record has no such value, or there are more than `MAX_GROUPS` distinct values.
    """
    groups: list[str] = []
    for shard in split.shards:
        records = range(shard.start, shard.stop)
        for _, record, example, fault in read_examples(shard.path, index_shard(shard.path), records):
            if fault:
                raise DataError(f"{record} {fault}", fix="fetch or write the shard again")
            value = example.features.feature.get(field)
            values: list[Any] = [*value.bytes_list.value, *value.int64_list.value] if value else []
            if len(values) != 1:
                problem = f"{record} does not have exactly one text or whole number in this field"
                fix = f"set one of {describe_fields(example)}"
                raise DataError(problem, key="data.group_field", value=field, fix=fix)
            group = values[0]
            if isinstance(group, bytes):
                groups.append(_escape_text(group))
            elif names is None:
                groups.append(str(group))
            elif 0 <= group < len(names):
                groups.append(names[group])
            else:
                problem, fix = f"{record} holds {group}, but there are {len(names)} names", "set another field"
                raise DataError(problem, key="data.group_field", value=field, fix=fix)
    distinct = set(groups)
    if len(distinct) > MAX_GROUPS:
        count = f"{len(distinct):,} different values among the {split.count:,} {split.name} examples"
        problem, fix = f"{count}, such as {min(distinct)!r}", f"set a field of at most {MAX_GROUPS} different values"
        raise DataError(problem, key="data.group_field", value=field, fix=fix)
    return tuple(groups)
