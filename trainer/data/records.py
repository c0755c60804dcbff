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

HEADER_BYTES, FOOTER_BYTES = 12, 4  # length and its checksum before a payload; checksum of the payload after it
UNLABELLED = -1  # the label that TFDS stores for an example without a label
MAX_GROUPS = 100  # maximum number of distinct values of data.group_field; the report has scores for each value


class RecordLocation(NamedTuple):
    """Location of a record in a shard, and the name of its image field."""

    path: str  # path of the shard
    record_index: int  # index of the record in the shard
    offset: int  # offset of the payload in the shard, in bytes
    length: int  # length of the payload, in bytes
    image_field: str

    @property
    def name(self) -> str:
        """The record as PATH#INDEX, escaped for display."""
        return f"{escape_unprintable(self.path)}#{self.record_index}"


@dataclass(frozen=True)
class ShardIndex:
    """Offsets and lengths of the payloads in one TFRecord file."""

    offsets: np.ndarray  # int64 [n], bytes
    lengths: np.ndarray  # int64 [n], bytes
    error: str | None  # why the file cannot be read beyond record n - 1; None if it is complete

    @property
    def count(self) -> int:
        """Number of records, n."""
        return len(self.offsets)


def locate_records(split: Split) -> list[RecordLocation]:
    """Read the record headers of a split's shards, and return each example's location, in index order.

    Raises:
        DataError: a shard cannot be indexed (`index_shard`).
        IndexError: a shard has fewer records than the split uses.
    """
    indexes = {path: index_shard(path) for path in {shard.path for shard in split.shards}}
    return [
        RecordLocation(s.path, n, int(indexes[s.path].offsets[n]), int(indexes[s.path].lengths[n]), split.image_field)
        for s in split.shards
        for n in range(s.start, s.stop)
    ]


def compute_masked_crc32c(content: bytes) -> int:
    """Compute the checksum that TFRecord files store: the CRC32C, rotated right by 15 bits, plus a constant."""
    crc = google_crc32c.value(content)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def is_truncated_at(file: Path, start: int) -> bool:
    """Return whether a TFRecord file ends at byte `start`, or before the end of the record that begins there.

    If that record's header is corrupt, the file counts as corrupt instead of truncated, and the result is False.
    """
    with open(file, "rb") as stream:
        stream.seek(start)
        header, remaining_bytes = stream.read(HEADER_BYTES), file.stat().st_size - start
    if len(header) < HEADER_BYTES:
        return True
    length, length_crc = struct.unpack("<QI", header)
    return length_crc == compute_masked_crc32c(header[:8]) and remaining_bytes < HEADER_BYTES + length + FOOTER_BYTES


def frame_record(payload: bytes) -> bytes:
    """Return the bytes of one record: header, payload and footer."""
    length = struct.pack("<Q", len(payload))
    length_crc, payload_crc = (struct.pack("<I", compute_masked_crc32c(content)) for content in (length, payload))
    return length + length_crc + payload + payload_crc


def make_unreadable_error(path: str | Path, error: OSError) -> DataError:
    """Build the error for a file that the operating system cannot read."""
    problem = f"{escape_unprintable(str(path))} cannot be read: {error.strerror}"
    return DataError(problem, fix="check that it exists and its permissions")


def join_first(items: Sequence[str], separator: str = ", ") -> str:
    """Join the first five items for a message, followed by the number of further items, such as "and 2 more"."""
    ending = [f"and {len(items) - 5} more"] if len(items) > 5 else []
    return separator.join([*items[:5], *ending])


def index_shard(path: str | Path) -> ShardIndex:
    """Read the record headers of a shard, about a million per second, and return the location of each payload.

    If the file is truncated, or a header after the first one is corrupt, the result has the records before that, and
    its `error` is the reason. An empty file has no records and no error.

    Raises:
        DataError: the file is missing, unreadable, compressed, or not a TFRecord file.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            if size == 0:
                return ShardIndex(np.zeros(0, np.int64), np.zeros(0, np.int64), None)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as shard_bytes:
                return _read_headers(escape_unprintable(str(path)), shard_bytes, size)
    except OSError as error:
        raise make_unreadable_error(path, error) from None


def _read_headers(path: str, shard_bytes: mmap.mmap, size: int) -> ShardIndex:
    """Index a memory-mapped shard of `size` bytes, as `index_shard` does. `path` is escaped for messages."""
    offsets: list[int] = []
    lengths: list[int] = []
    start, error = 0, None
    while start < size:
        header = shard_bytes[start : start + HEADER_BYTES]
        end = start + HEADER_BYTES
        if len(header) == HEADER_BYTES:
            length, length_crc = struct.unpack("<QI", header)
            if length_crc != compute_masked_crc32c(header[:8]):
                if start == 0:
                    predicate = "is gzip-compressed" if header[:2] == b"\x1f\x8b" else "is not a TFRecord file"
                    fix = "write its tf.train.Example records as an uncompressed TFRecord file"
                    raise DataError(f"shard {path} {predicate}", fix=fix)
                error = f"shard {path} is corrupt at the header of record {len(offsets)}"
                break
            end += length + FOOTER_BYTES
        if end > size:
            error = f"shard {path} is truncated: it ends inside record {len(offsets)}, {end - size} bytes early"
            break
        offsets.append(start + HEADER_BYTES)
        lengths.append(length)
        start = end
    return ShardIndex(np.array(offsets, np.int64), np.array(lengths, np.int64), error)


def read_examples(path: str, index: ShardIndex, records: Iterable[int]) -> Iterator[tuple[int, str, Any, str]]:
    """Read some records of a shard, and verify their checksums.

    Args:
        path: the shard's path, not escaped.
        index: the result of `index_shard` for the shard.
        records: indices of the records to read.

    Yields:
        For each record: its index in the shard, its name for messages, its Example, and an error description. The
        Example is None if the record is corrupt, and the description is "" if the record is intact.

    Raises:
        OSError: the file cannot be read.
        IndexError: the shard has no record with one of the indices.
    """
    if not index.count:  # an empty file cannot be mapped
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as shard_bytes:
        for record_index in records:
            start = int(index.offsets[record_index])
            end = start + int(index.lengths[record_index])
            example, error = _parse_payload(shard_bytes[start:end], shard_bytes[end : end + FOOTER_BYTES])
            name = f"record {record_index} of shard {escape_unprintable(path)}"
            yield record_index, _append_source_name(name, example), example, error


# Copy of tensorflow/core/example/{example,feature}.proto, because importing TensorFlow takes eight seconds per process.
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


def serialize_example(image: bytes, label: int, texts: Mapping[str, str] | None = None) -> bytes:
    """Serialize a `tf.train.Example` with the bytes field "image", the int64 field "label", and a field per text.

    Args:
        image: the encoded image.
        label: class index.
        texts: field name -> text, which is stored as UTF-8.
    """
    example = get_example_class()()
    example.features.feature["image"].bytes_list.value.append(image)
    example.features.feature["label"].int64_list.value.append(label)
    for name, text in (texts or {}).items():
        example.features.feature[name].bytes_list.value.append(text.encode())
    return example.SerializeToString(deterministic=True)


# Type of a field for messages, by the name of the list that holds the values in its `Feature`; None for an unset list.
_FIELD_TYPES = {"bytes_list": "bytes", "float_list": "float", "int64_list": "int64", None: "empty"}


def _escape_text(value: bytes) -> str:
    """Decode bytes as UTF-8, and escape invalid bytes and unprintable characters."""
    return escape_unprintable(value.decode("utf-8", "backslashreplace"))


def describe_fields(example: Any) -> str:
    """List the fields of an Example for a message, such as "image (bytes), label (int64)"."""
    types = {
        escape_unprintable(name): _FIELD_TYPES[feature.WhichOneof("kind")]
        for name, feature in example.features.feature.items()
    }
    return ", ".join(f"{name} ({field_type})" for name, field_type in sorted(types.items())) or "no fields"


NOT_AN_EXAMPLE = "is not a tf.train.Example, although its checksum matches"  # beginning of an error description


def _parse_payload(payload: bytes, footer: bytes) -> tuple[Any, str]:
    """Verify a payload against its footer. Return its Example and "", or None and a description of the error."""
    if struct.pack("<I", compute_masked_crc32c(payload)) != footer:
        return None, "is corrupt (checksum mismatch)"
    try:
        example = get_example_class().FromString(payload)
    except Exception:  # arbitrary bytes raise protobuf's DecodeError and other exceptions
        return None, NOT_AN_EXAMPLE
    return (example, "") if example.features.feature else (None, f"{NOT_AN_EXAMPLE}: it has no fields")


def _read_example(record: RecordLocation) -> tuple[Any, str]:
    """Read and verify a record. Return its Example and "", or None and a description of the error."""
    with open(record.path, "rb") as file:
        file.seek(record.offset)
        return _parse_payload(file.read(record.length), file.read(FOOTER_BYTES))


def read_image(record: RecordLocation) -> bytes:
    """Read a record's encoded image.

    Raises:
        DataError: the record is corrupt, or its image field does not have exactly one bytes value.
        OSError: the shard cannot be read.
    """
    example, error = _read_example(record)
    if error:
        raise DataError(f"{record.name} {error}", fix="fetch or write the shard again, or set data.on_error=skip")
    feature = example.features.feature.get(record.image_field)
    if feature is None or len(feature.bytes_list.value) != 1:
        raise _make_missing_image_error(_append_source_name(record.name, example), record.image_field, example)
    return feature.bytes_list.value[0]


SOURCE_FIELD = "filename"  # field in which `trainer.prepare` stores the name of the image file
_SOURCE_FIELDS = (SOURCE_FIELD, "file_name", "image/filename")  # fields in which kubetune and other programs store it


def read_source_name(record: RecordLocation) -> str:
    """Read the name of the image file that a record was written from, escaped for display.

    Returns "" if the record stores no name or is corrupt. Raises OSError if the shard cannot be read.
    """
    return _get_source_name(_read_example(record)[0])


def read_source_names(split: Split) -> Iterator[str]:
    """Yield each example's image file name, as `read_source_name` returns it, but read each shard sequentially."""
    for shard in split.shards:
        for _, _, example, _ in read_examples(shard.path, index_shard(shard.path), range(shard.start, shard.stop)):
            yield _get_source_name(example)


def _get_source_name(example: Any) -> str:
    """Return the image file name that an Example stores, escaped, or "" if it stores no name or `example` is None."""
    for field in () if example is None else _SOURCE_FIELDS:
        feature = example.features.feature.get(field)
        if feature is not None and len(feature.bytes_list.value) == 1:
            return _escape_text(feature.bytes_list.value[0])
    return ""


def _append_source_name(record: str, example: Any) -> str:
    """Append the image file name that an Example stores, if any, to `record`, the name of its record."""
    source_name = _get_source_name(example)
    return f"{record} ({source_name})" if source_name else record


def _make_missing_image_error(record: str, field: str, example: Any) -> DataError:
    """Build the error for the record named `record`, whose field `field` does not hold exactly one encoded image."""
    problem, fix = (
        f"{record} does not have exactly one bytes value in this field",
        f"set one of {describe_fields(example)}",
    )
    return DataError(problem, key="data.image_field", value=field, fix=fix)


@dataclass(frozen=True)
class LabelFields:
    """The names of a record's label and image fields, and how to interpret the label."""

    label_field: str
    image_field: str
    num_classes: int
    label_kind: str = "index"  # data.label_kind: index, index1, text or onehot
    class_names: tuple[str, ...] = ()  # only for the label kind "text", normalized by `normalize_class_name`


def read_labels(path: str, index: ShardIndex, fields: LabelFields) -> tuple[np.ndarray, list[str]]:
    """Read the labels of the n records of a shard. `index` is the result of `index_shard` for the shard.

    Returns:
        The class index of each record, int32 [n], and a list of error descriptions. Corrupt records, and records that
        store the index `UNLABELLED`, have the class index -1 and an error description each.

    Raises:
        DataError: an intact record's image field is missing or does not hold bytes, or its label is missing, not of the
            kind `fields.label_kind`, or not one of the classes.
        OSError: the shard cannot be read.
    """
    labels = np.full(index.count, -1, np.int32)
    errors: list[str] = []
    for record_index, record_name, example, error in read_examples(path, index, range(index.count)):
        if error:
            errors.append(f"{record_name} {error}")
            continue
        features = example.features.feature
        if fields.label_field not in features:
            problem, fix = f"{record_name} has no such field", f"set one of {describe_fields(example)}"
            raise DataError(problem, key="data.label_field", value=fields.label_field, fix=fix)
        if fields.image_field not in features or features[fields.image_field].WhichOneof("kind") != "bytes_list":
            raise _make_missing_image_error(record_name, fields.image_field, example)
        label_feature = features[fields.label_field]
        if fields.label_kind.startswith("index") and list(label_feature.int64_list.value) == [UNLABELLED]:
            errors.append(f"{record_name} {NOT_LABELLED_SUFFIX}")
            continue
        labels[record_index] = _parse_label(record_name, example, fields)
    return labels, errors


NOT_LABELLED_SUFFIX = f"is not labelled ({UNLABELLED})"  # end of an unlabelled record's error description


def make_label_error(error: str, field: str) -> DataError:
    """Build the exception for an error description from `read_labels` or `index_shard`. `field` is data.label_field."""
    if not error.endswith(NOT_LABELLED_SUFFIX):
        fix = "fetch or write it again, or set data.on_error=skip to leave out corrupt records"
        return DataError(error, fix=fix)
    fix = "leave its split out (tfds: data.validation_split=none, data.test_split=none), or set another field"
    return DataError(error, key="data.label_field", value=field, fix=f"{fix}, or data.on_error=skip if others have one")


def has_no_labels(shards: Sequence[Shard], label_field: str) -> bool:
    """Return whether every intact record of `shards` has the label `UNLABELLED`. Return False if there are no shards.

    Reading ends at the first intact record that has a different label or no label.

    Raises:
        DataError: a shard cannot be indexed (`index_shard`).
    """
    for shard in shards:
        index = index_shard(shard.path)
        for _, _, example, error in read_examples(shard.path, index, range(shard.start, min(shard.stop, index.count))):
            if not error and list(example.features.feature[label_field].int64_list.value) != [UNLABELLED]:
                return False
    return bool(shards)


def _parse_label(record: str, example: Any, fields: LabelFields) -> int:
    """Return the class index, from 0, that a record's Example stores. `record` is the record's name for messages.

    Raises DataError if the label field does not hold exactly one label, of the kind `fields.label_kind` and of a known
    class.
    """
    feature = example.features.feature[fields.label_field]
    list_name = feature.WhichOneof("kind")
    values: list[Any] = list(getattr(feature, list_name).value) if list_name else []
    display_values = [_escape_text(v) if isinstance(v, bytes) else v for v in values]
    statement = f"{record} holds {_describe_label(display_values, fields)}"
    is_vector = list_name != "bytes_list" and len(values) > 1 and sorted(values) == [0] * (len(values) - 1) + [1]
    is_onehot = is_vector and len(values) == fields.num_classes
    if is_vector and not is_onehot:
        problem = (
            f"{statement}, which is one-hot for {len(values)} classes, but there are {fields.num_classes} class names"
        )
        fix = f"give {len(values)} class names, or set another data.label_field"
        raise DataError(problem, key="data.class_names", fix=fix)
    actual_kind = "onehot" if is_onehot else "text" if list_name == "bytes_list" else "index"
    if len(values) != 1 and not is_onehot:
        fix = "keep one label per image, or set another field" if values else f"set one of {describe_fields(example)}"
        problem = f"{statement}, and a classifier needs one label"
        raise DataError(problem, key="data.label_field", value=fields.label_field, fix=fix)
    if list_name == "float_list" and not is_onehot:
        fix = f"write class indices as integers, or set one of {describe_fields(example)}"
        raise DataError(
            f"{statement}, which is not a class index", key="data.label_field", value=fields.label_field, fix=fix
        )
    if actual_kind != fields.label_kind.removesuffix("1"):
        fix = f"set data.label_kind={actual_kind}, or another data.label_field of {describe_fields(example)}"
        raise DataError(f"{statement}", key="data.label_kind", value=fields.label_kind, fix=fix)
    if fields.label_kind == "text":
        class_name = normalize_class_name(display_values[0])
        if class_name not in fields.class_names:
            problem = f"{statement}, which is not in data.class_names"
            fix = f"add it to {join_first(fields.class_names)}, or set another field"
            raise DataError(problem, key="data.label_field", value=fields.label_field, fix=fix)
        return fields.class_names.index(class_name)
    if is_onehot:
        return int(np.argmax(values))
    base = 1 if fields.label_kind == "index1" else 0
    if not base <= values[0] < base + fields.num_classes:
        problem = f"the label {values[0]} of {record} is outside {base}..{base + fields.num_classes - 1}"
        other_kind = "index" if base else "index1"
        fits_other = values[0] == (0 if base else fields.num_classes)
        hint = f"if labels begin with {1 - base}, set data.label_kind={other_kind}; otherwise " if fits_other else ""
        fix = f"{hint}set another field, or one class name per label instead of {fields.num_classes}"
        raise DataError(problem, key="data.label_field", value=fields.label_field, fix=fix)
    return int(values[0]) - base


def _describe_label(values: Sequence[Any], fields: LabelFields) -> str:
    """Describe the values of a label field for a message, such as "the text dog" or "3 labels (1, 4, 5)"."""
    if len(values) == 1:
        noun = {str: "the text", float: "the decimal number", int: "the number"}[type(values[0])]
        return f"{noun} {values[0]}"
    if not values:
        return "no label"
    value_list = f"({join_first([f'{v:g}' if isinstance(v, float) else str(v) for v in values])})"
    return f"{len(values)} {'numbers' if len(values) == fields.num_classes else 'labels'} {value_list}"


def read_groups(split: Split, field: str, names: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """Read the group of each example in a split that consists of records, in index order.

    Args:
        field: the field given by data.group_field, with one text or whole number per record.
        names: names of the groups 0, 1, ... if the field holds whole numbers. None to convert the numbers to text.

    Raises:
        DataError: a shard or record cannot be read, a record does not have exactly one text or whole number in the
            field, a number has no name, or there are more than `MAX_GROUPS` distinct groups.
    """
    groups: list[str] = []
    for shard in split.shards:
        record_indices = range(shard.start, shard.stop)
        for _, record_name, example, error in read_examples(shard.path, index_shard(shard.path), record_indices):
            if error:
                raise DataError(f"{record_name} {error}", fix="fetch or write the shard again")
            feature = example.features.feature.get(field)
            values: list[Any] = [*feature.bytes_list.value, *feature.int64_list.value] if feature else []
            if len(values) != 1:
                problem = f"{record_name} does not have exactly one text or whole number in this field"
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
                problem, fix = f"{record_name} holds {group}, but there are {len(names)} names", "set another field"
                raise DataError(problem, key="data.group_field", value=field, fix=fix)
    distinct_groups = set(groups)
    if len(distinct_groups) > MAX_GROUPS:
        statement = f"{len(distinct_groups):,} different values among the {split.count:,} {split.name} examples"
        problem, fix = (
            f"{statement}, such as {min(distinct_groups)!r}",
            f"set a field of at most {MAX_GROUPS} different values",
        )
        raise DataError(problem, key="data.group_field", value=field, fix=fix)
    return tuple(groups)
