"""TFRecord files by pattern, split by files."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from trainer.config.schema import Data
from trainer.data.splits import Found, Note, RecordSource, part_sizes, read_shards, split_of
from trainer.errors import DataError
from trainer.types import Shard


def open_tfrecords(data: Data, cache_dir: Path, note: Note) -> Found:
    """The first validation_fraction of the sorted files validates, the next test_fraction tests, the rest trains.

    Raises:
        DataError: no file fits the pattern, there are fewer files than splits, or a shard is not as expected.
    """
    assert data.pattern
    assert data.class_names
    paths = sorted(p for p in glob.glob(os.path.expanduser(data.pattern), recursive=True) if os.path.isfile(p))
    if not paths:
        raise DataError(f"no file fits data.pattern={data.pattern} (seen from {os.getcwd()})")
    fractions = {"validation": data.validation_fraction, "test": data.test_fraction}
    wanted = ["train", *(part for part, fraction in fractions.items() if fraction > 0)]
    if len(paths) < len(wanted):
        raise DataError(
            f"data.pattern={data.pattern} fits {len(paths)} file{'s' * (len(paths) > 1)}, too few for the splits "
            f"{', '.join(wanted)}: write more shards (python -m trainer.prepare), or set data.validation_fraction=0"
            f"{' and data.test_fraction=0' * (data.test_fraction > 0)}"
        )
    sizes = part_sizes(len(paths), fractions)
    first, second = sizes["validation"], sizes["validation"] + sizes["test"]
    parts = {"train": paths[second:], "validation": paths[:first], "test": paths[first:second]}
    source = RecordSource(data.image_field, data.label_field, len(data.class_names), cache_dir, data.on_error, note)
    labels, facts, skipped = read_shards(paths, source)
    splits = {
        name: split_of(name, [Shard(p, len(labels[p]), 0, len(labels[p])) for p in files], labels, source)
        for name, files in parts.items()
        if files
    }
    return Found(os.path.basename(os.path.dirname(paths[0])) or "tfrecords", data.class_names, splits, facts, skipped)
