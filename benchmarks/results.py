"""Results of one row: pairs of interleaved runs, saved as JSON from which the page is written."""

import datetime
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from trainer.data.host import count_usable_cpus

Unit = Literal["s", "images/s", "MB"]


@dataclass(frozen=True)
class Comparison:
    """One figure of ours and of something else, interleaved: round i of both is a pair."""

    what: str
    against: str
    unit: Unit
    ours: list[float]
    other: list[float]

    @property
    def ratios(self) -> list[float]:
        """Ratio per round; above 1 ours is better: faster, or smaller."""
        pairs = zip(self.ours, self.other, strict=True)
        return [a / b if self.unit == "images/s" else b / a for a, b in pairs]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


@dataclass(frozen=True)
class Table:
    """A table of other figures; cells are text."""

    title: str
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Result:
    """A section of the page.

    Attributes:
        how: description of the measurement, in sentences.
        command: the command that repeats it.
        machine: cores, processor and versions.
    """

    name: str  # of the file
    title: str
    how: str
    command: str
    comparisons: list[Comparison]
    tables: list[Table] = field(default_factory=list)
    machine: str = field(default_factory=lambda: this_machine())
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())


def this_machine() -> str:
    """Usable cores, kind of processor, versions."""
    packages = ", ".join(f"{name} {version(name.lower())}" for name in ("TensorFlow", "Keras"))
    gpu = "a GPU" if os.path.exists("/dev/nvidia0") else "no GPU"
    return f"{count_usable_cpus()} cores ({platform.machine()}), {gpu}, {packages}, Python {platform.python_version()}"


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Median, and the range where there is one: "1.30 (1.10 to 1.52)"."""
    median = form.format(statistics.median(values))
    return f"{median} ({form.format(min(values))} to {form.format(max(values))})" if len(values) > 1 else median


def amount(values: Sequence[float], unit: Unit) -> str:
    """Median with its unit, three digits or all before the point: "12.3 s"."""
    median = statistics.median(values)
    digits = 0 if abs(median) >= 100 else 1 if abs(median) >= 10 else 2 if abs(median) >= 1 else 3
    return f"{median:,.{digits}f} {unit}"


def save(result: Result, out: Path) -> None:
    """Write `out/NAME.json`, and print the ratios."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{result.name}.json").write_text(json.dumps(asdict(result), indent=1) + "\n")
    print(f"== {result.title}")
    for c in result.comparisons:
        print(f"{c.what}: {amount(c.ours, c.unit)}, {c.against} {amount(c.other, c.unit)}; "
              f"ratio {spread(c.ratios)}, {len(c.ratios)} rounds")  # fmt: skip
    for table in result.tables:
        print("\n".join([table.title, *(" | ".join(row) for row in [table.header, *table.rows])]))
    print(f"saved to {out / result.name}.json", flush=True)


def read(folder: Path) -> list[Result]:
    """All results of a folder, by file name."""
    results = []
    for file in sorted(folder.glob("*.json")):
        raw = json.loads(file.read_text())
        raw["comparisons"] = [Comparison(**c) for c in raw["comparisons"]]
        raw["tables"] = [Table(**t) for t in raw["tables"]]
        results.append(Result(**raw))
    return results
