"""predictions.csv: exact bytes, replaced atomically."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.nasty import file_names
from trainer.evaluation.metrics import score_predictions
from trainer.evaluation.predictions import write_predictions
from trainer.names import decode_cell, encode_cell, escape_unprintable


def test_the_bytes(tmp_path: Path) -> None:
    names = ["a/1.jpg", 'with, comma and "quote".png', "shard-00000#7", "bad\udcff\nname"]
    labels = np.array([0, 1, 1, 0], np.int32)
    probabilities = np.array([[0.75, 0.25], [2 / 3, 1 / 3], [1e-9, 1.0], [1.0, 0.0]], np.float32)
    result = score_predictions("test", ("cat", "café, black"), labels, probabilities, names)
    path = tmp_path / "new" / "predictions.csv"
    path.parent.mkdir()
    path.write_text("old\n" * 1000)
    write_predictions(path, result)
    assert [file.name for file in path.parent.iterdir()] == ["predictions.csv"]
    assert path.read_bytes().decode("utf-8") == (
        "index,file,truth,prediction,probability,correct\n"
        "0,a/1.jpg,cat,cat,0.750000,true\n"
        '1,"with, comma and ""quote"".png","café, black",cat,0.666667,false\n'
        '2,shard-00000#7,"café, black","café, black",1.000000,true\n'
        "3,bad\\xff\\nname,cat,cat,1.000000,true\n"
    )
    write_predictions(path, replace(result, sources=("cat/1.jpg", "=1", "", "a b.png")))
    lines = path.read_text().splitlines()
    assert lines[0] == "index,file,truth,prediction,probability,correct,source"
    assert [line.rpartition(",")[2] for line in lines[1:]] == ["cat/1.jpg", "'=1", "", "a b.png"]


FORMULAS = (
    "=cmd|' /C calc'!A0",
    "+1",
    "-1+2",
    "@SUM(A1)",
    " =1",
    "\t=1",
    "\r=1",
    "\uff1d1",
    "\u00a0=1",
    "'=1",
    "''",
    "\ufeff=1",
)


def test_no_cell_is_a_formula_and_a_reader_gets_the_name_back(tmp_path: Path) -> None:
    names = [*FORMULAS, *file_names(3, 200)]
    classes = [*dict.fromkeys(map(escape_unprintable, names))]
    labels = np.array([classes.index(escape_unprintable(name)) for name in names], np.int32)
    result = score_predictions("test", classes, labels, np.eye(len(classes), dtype=np.float32)[labels], names)
    write_predictions(tmp_path / "p.csv", result)
    with open(tmp_path / "p.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, name in zip(rows, names, strict=True):
        for key in ("file", "truth", "prediction"):
            assert decode_cell(row[key]) == escape_unprintable(name)
            assert row[key].lstrip("\ufeff \u00a0")[:1] not in ("=", "+", "-", "@", "\t", "\r", "\uff1d"), ascii(
                row[key]
            )


@pytest.mark.parametrize("name", ["cat", "a=b", "a-b", "1-2", "it's", ""])
def test_other_names_are_unchanged(name: str) -> None:
    assert encode_cell(name) == name == decode_cell(name)


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("a;=cmd|x", "a;'=cmd|x"),
        ("=a; +1;-2", "'=a; '+1;'-2"),
        ("a;'=1", "a;''=1"),
        ("a;b=1", "a;b=1"),
        ("a;;@x", "a;;'@x"),
    ],
)
def test_a_name_is_no_formula_where_cells_end_at_semicolons(name: str, cell: str) -> None:
    assert encode_cell(name) == cell
    assert decode_cell(cell) == name
