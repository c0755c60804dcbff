"""Results of a benchmark: pairs of interleaved measurements, in JSON files that `benchmarks.page` reads."""

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
    """Measurements of this package and of an alternative, in interleaved rounds."""

    what: str  # what is measured, such as "later epochs, decoded again"
    against: str  # name of the alternative, such as "directory loader"
    unit: Unit  # unit of the measurements
    ours: list[float]  # measurement of this package in each round
    other: list[float]  # measurement of the alternative in each round

    @property
    def ratios(self) -> list[float]:
        """The ratio in each round. Above 1, this package is better (faster, or needs less memory)."""
        pairs = zip(self.ours, self.other, strict=True)
        return [a / b if self.unit == "images/s" else b / a for a, b in pairs]

    @property
    def ratio(self) -> float:
        """The median ratio."""
        return statistics.median(self.ratios)


@dataclass(frozen=True)
class Table:
    """A table of further measurements. Cells are text."""

    title: str
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Result:
    """A benchmark's results, which become a section of the page.

    Attributes:
        name: name of the JSON file, without its suffix.
        title: title of the section.
        how: description of the measurement, in sentences.
        command: the command that repeats the measurement.
        machine: description of the machine, from `describe_machine`.
        date: date of the measurement, in ISO 8601.
    """

    name: str
    title: str
    how: str
    command: str
    comparisons: list[Comparison]
    tables: list[Table] = field(default_factory=list)
    machine: str = field(default_factory=lambda: describe_machine())
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())


def describe_machine() -> str:
    """Describe this machine: usable cores, processor architecture, GPU, and versions of the packages."""
    packages = ", ".join(f"{name} {version(name.lower())}" for name in ("TensorFlow", "Keras"))
    gpu = "a GPU" if os.path.exists("/dev/nvidia0") else "no GPU"
    return f"{count_usable_cpus()} cores ({platform.machine()}), {gpu}, {packages}, Python {platform.python_version()}"


def format_median_and_range(values: Sequence[float], number_format: str = "{:.2f}") -> str:
    """Format the median and the range, such as "1.30 (1.10 to 1.52)"; only the value if there is a single one."""
    median = number_format.format(statistics.median(values))
    value_range = f"{number_format.format(min(values))} to {number_format.format(max(values))}"
    return f"{median} ({value_range})" if len(values) > 1 else median


def format_median(values: Sequence[float], unit: Unit) -> str:
    """Format the median with its unit, rounded to three significant digits or an integer, such as "12.3 s"."""
    median = statistics.median(values)
    digits = 0 if abs(median) >= 100 else 1 if abs(median) >= 10 else 2 if abs(median) >= 1 else 3
    return f"{median:,.{digits}f} {unit}"


def save_result(result: Result, out: Path) -> None:
    """Write a result to `out/NAME.json`, and print the ratios."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{result.name}.json").write_text(json.dumps(asdict(result), indent=1) + "\n")
    print(f"== {result.title}")
    for c in result.comparisons:
        print(f"{c.what}: {format_median(c.ours, c.unit)}, {c.against} {format_median(c.other, c.unit)}; "
              f"ratio {format_median_and_range(c.ratios)}, {len(c.ratios)} rounds")  # fmt: skip
    for table in result.tables:
        print("\n".join([table.title, *(" | ".join(row) for row in [table.header, *table.rows])]))
    print(f"saved to {out / result.name}.json", flush=True)


def read_results(folder: Path) -> list[Result]:
    """Read all results in a folder, sorted by file name."""
    results = []
    for file in sorted(folder.glob("*.json")):
        fields = json.loads(file.read_text())
        fields["comparisons"] = [Comparison(**comparison) for comparison in fields["comparisons"]]
        fields["tables"] = [Table(**table) for table in fields["tables"]]
        results.append(Result(**fields))
    return results
