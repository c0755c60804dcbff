"""What a run says and imports at its start."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trainer.command_line import _hidden
from trainer.contracts import Shard, Split
from trainer.start import _own_shards

ROOT = Path(__file__).parents[1]
WHOLE = tuple(Shard(f"{name}.tfrecord", 10, 0, 10) for name in "abcd")
# As debug.max_examples leaves it: single records out of two files.
PIECES = tuple(Shard(f"{name}.tfrecord", 10, at, at + 1) for name in "ab" for at in (0, 3, 5, 9))


@pytest.mark.parametrize(
    ("shards", "expected"), [(WHOLE, (2, 4, 20, 40)), (PIECES, (2, 2, 4, 8)), (PIECES[:4], (1, 1, 2, 4))]
)
def test_shards_are_counted_by_file(shards: tuple[Shard, ...], expected: tuple[int, int, int, int]) -> None:
    records = sum(shard.stop - shard.start for shard in shards)
    assert _own_shards(Split("train", np.zeros(records, np.int32), shards=shards), 2, 0) == expected


def test_what_only_the_report_needs_is_imported_with_the_report() -> None:
    program = """
import sys
from trainer.command_line import quiet_start
with quiet_start():
    from trainer import train
print(sorted({"sklearn", "scipy.stats", "matplotlib"} & set(sys.modules)))
import matplotlib.pyplot, sklearn.metrics, trainer.finish
print(matplotlib.pyplot.figure, sklearn.metrics.f1_score)
"""
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    early, later = answer.stdout.splitlines()
    assert early == "[]"
    assert "None" not in later


def test_a_package_is_hidden_unless_it_is_there_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "found_later.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with _hidden(["json", "found_later"]):
        assert importlib.import_module("json") is json
        with pytest.raises(ImportError):
            importlib.import_module("found_later")
    assert importlib.import_module("found_later").__file__ == str(tmp_path / "found_later.py")
    assert sys.modules["json"] is json
