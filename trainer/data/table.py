"""Read a CSV file of texts: the cells of each row by column, with the numbers that a spreadsheet shows for the rows."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.data.records import join_first
from trainer.errors import DataError
from trainer.names import escape_unprintable
from trainer.storage.path import storage_path

_SEPARATORS = (",", ";", "\t")  # the first one with which the header has the required columns is used


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    number: int  # as in a spreadsheet: the header has number 1
    cells: dict[str, str]  # by column

    def __getitem__(self, column: str) -> str:
        return self.cells[column]


@dataclass(frozen=True)
class Table:
    """The columns of a CSV file, in lower case, and its rows without the blank ones."""

    columns: tuple[str, ...]
    rows: list[Row]


def read_table(address: str, key: str, required: Sequence[str], optional: Sequence[str] = ()) -> Table:
    """Read the CSV file at an address, local or in a bucket; `key` is the configuration key that has the address.

    A byte order mark, quoted cells with separators and line breaks, and semicolons or tabs instead of commas are
    accepted.

    Args:
        required: columns that the header must have.
        optional: further columns, for the error about a header.

    Raises:
        DataError: there is no such file, it is not UTF-8 or not CSV, its header lacks a column or has it twice, or a
            row has more cells than the header.
        Interrupted: the bucket does not respond.
    """
    header = ",".join(required) + "".join(f"[,{name}]" for name in optional)
    text = _read_text(address, key, f"set the path of a CSV file with the columns {header}")
    fault: DataError | None = None
    for separator in _SEPARATORS:
        try:
            records = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True))
        except csv.Error as error:
            fix = "close each quote, and write a quote inside quotes twice"
            fault = fault or DataError(f"is not CSV ({error})", key=key, value=address, fix=fix)
            continue
        columns = tuple(name.strip().lower() for name in (records or [[]])[0])
        if set(required) <= set(columns):
            return _make_table(columns, records, key, address)
        if fault is None:
            lacks = " and ".join(name for name in required if name not in columns)
            first = escape_unprintable(join_first(columns)) if any(columns) else "nothing"
            problem = f"has no column {lacks}: its first row has {first}"
            fault = DataError(problem, key=key, value=address, fix=f"begin it with the row {header}")
    assert fault
    raise fault


def _read_text(address: str, key: str, fix: str) -> str:
    """Read a file as UTF-8, without a byte order mark."""
    path = storage_path(address)
    if path.is_local and Path(str(path)).is_dir():
        raise DataError("is a folder", key=key, value=address, fix=fix)
    try:
        content = path.fetch()
    except DataError as error:
        raise DataError(error.problem, key=key, value=address, fix=error.fix) from None
    if content is None:
        raise DataError("does not exist", key=key, value=address, fix=fix)
    try:
        text = content[0].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[0][: error.start].count(b"\n") + 1
        raise DataError(f"is not UTF-8 in line {line}", key=key, value=address, fix="save it as CSV in UTF-8") from None
    before, null, _ = text.partition("\0")
    if null:
        problem = f"has a null character in line {before.count(chr(10)) + 1}"
        raise DataError(problem, key=key, value=address, fix="save it as CSV in UTF-8")
    return text


def _make_table(columns: tuple[str, ...], records: list[list[str]], key: str, address: str) -> Table:
    if repeated := [name for name in dict.fromkeys(columns) if name and columns.count(name) > 1]:
        problem = f"has several columns {escape_unprintable(join_first(repeated))}"
        raise DataError(problem, key=key, value=address, fix="give each column another name")
    rows = []
    for number, cells in enumerate(records[1:], 2):
        if len(cells) > len(columns):
            problem = f"row {number} has {len(cells)} cells, but the first row has {len(columns)}"
            raise DataError(problem, key=key, value=address, fix="put a name that contains the separator in quotes")
        if any(cell.strip() for cell in cells):
            padded = [*cells, *[""] * (len(columns) - len(cells))]
            rows.append(Row(number, dict(zip(columns, padded, strict=True))))
    return Table(columns, rows)
