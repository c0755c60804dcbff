"""Read a CSV file as rows of strings by column name. Rows are numbered as in a spreadsheet."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.data.records import join_first
from trainer.errors import DataError
from trainer.names import escape_unprintable
from trainer.storage.path import storage_path

_SEPARATORS = (",", ";", "\t")  # tried in this order, until the header has the required columns


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    number: int  # as in a spreadsheet, where the header has number 1
    cells: dict[str, str]  # column name -> text

    def __getitem__(self, column: str) -> str:
        """Return the cell in a column."""
        return self.cells[column]


@dataclass(frozen=True)
class Table:
    """The content of a CSV file."""

    columns: tuple[str, ...]  # names in lower case, without surrounding spaces
    rows: list[Row]  # without the header and blank rows


def read_table(address: str, key: str, required: Sequence[str], optional: Sequence[str] = ()) -> Table:
    """Read a CSV file, local or in a bucket.

    Cells are separated by commas, semicolons or tabs. Quoted cells can contain separators and line breaks. A byte order
    mark is ignored. A row with fewer cells than the header ends with empty cells.

    Args:
        address: the path or address of the file.
        key: the configuration key whose value is `address`, for error messages.
        required: columns that the header must have.
        optional: columns that a message about a wrong header also lists. Any other columns are read too.

    Raises:
        DataError: the file does not exist or cannot be read, it is not UTF-8 or not CSV, its header lacks a required
            column or has a name twice, or a row has more cells than the header.
        Interrupted: the bucket does not respond.
    """
    expected_header = ",".join(required) + "".join(f"[,{name}]" for name in optional)
    text = _read_text(address, key, f"set the path of a CSV file with the columns {expected_header}")
    first_error: DataError | None = None
    for separator in _SEPARATORS:
        try:
            raw_rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True))
        except csv.Error as error:
            fix = "close each quote, and write a quote inside quotes twice"
            first_error = first_error or DataError(f"is not CSV ({error})", key=key, value=address, fix=fix)
            continue
        columns = tuple(name.strip().lower() for name in (raw_rows or [[]])[0])
        if set(required) <= set(columns):
            return _make_table(columns, raw_rows, key, address)
        if first_error is None:
            missing_columns = " and ".join(name for name in required if name not in columns)
            header = escape_unprintable(join_first(columns)) if any(columns) else "nothing"
            problem = f"has no column {missing_columns}: its first row has {header}"
            first_error = DataError(problem, key=key, value=address, fix=f"begin it with the row {expected_header}")
    assert first_error
    raise first_error


def _read_text(address: str, key: str, fix: str) -> str:
    """Read a UTF-8 file, without its byte order mark. `fix` is the advice if the file does not exist."""
    path = storage_path(address)
    if path.is_local and Path(str(path)).is_dir():
        raise DataError("is a folder", key=key, value=address, fix=fix)
    try:
        fetched = path.fetch()  # content and version
    except DataError as error:
        raise DataError(error.problem, key=key, value=address, fix=error.fix) from None
    if fetched is None:
        raise DataError("does not exist", key=key, value=address, fix=fix)
    try:
        text = fetched[0].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = fetched[0][: error.start].count(b"\n") + 1
        raise DataError(f"is not UTF-8 in line {line}", key=key, value=address, fix="save it as CSV in UTF-8") from None
    text_before, null, _ = text.partition("\0")
    if null:
        problem = f"has a null character in line {text_before.count(chr(10)) + 1}"
        raise DataError(problem, key=key, value=address, fix="save it as CSV in UTF-8")
    return text


def _make_table(columns: tuple[str, ...], raw_rows: list[list[str]], key: str, address: str) -> Table:
    """Build a table from parsed rows. The first row is the header, which has the names `columns`."""
    if duplicates := [name for name in dict.fromkeys(columns) if name and columns.count(name) > 1]:
        problem = f"has several columns {escape_unprintable(join_first(duplicates))}"
        raise DataError(problem, key=key, value=address, fix="give each column another name")
    rows = []
    for number, cells in enumerate(raw_rows[1:], 2):
        if len(cells) > len(columns):
            problem = f"row {number} has {len(cells)} cells, but the first row has {len(columns)}"
            raise DataError(problem, key=key, value=address, fix="put a name that contains the separator in quotes")
        if any(cell.strip() for cell in cells):
            padded_cells = [*cells, *[""] * (len(columns) - len(cells))]
            rows.append(Row(number, dict(zip(columns, padded_cells, strict=True))))
    return Table(columns, rows)
