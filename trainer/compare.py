"""`python -m trainer.compare RUN RUN ... [output=FILE.html]`: runs side by side, on the examples they share.

Each RUN is the output_dir of a finished run, here or in a bucket, or a folder that `python -m trainer.evaluate` wrote.
The first is what the others are compared with. Prints a table and writes a page (compare.html where nothing else is
said). Exit code 0, or 2 where runs cannot be compared.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trainer.cli.process import exit_with_code
from trainer.errors import ConfigError, DataError
from trainer.monitoring.log import say
from trainer.report.compare import (
    Comparison,
    Scored,
    compare_runs,
    configuration_differences,
    verdict,
    write_comparison,
)
from trainer.storage.path import Place, place


def read_scored(address: str, name: str) -> Scored:
    """A run's report, or an evaluation's, with the predictions beside it.

    Raises:
        DataError: there is none.
    """
    home = place(address)
    folder = home if (home / "report.json").exists() else home / "report"
    report, rows = (folder / "report.json").fetch(), (folder / "predictions.csv").fetch()
    if report is None or rows is None:
        raise DataError(
            f"{address} holds no report (report/report.json and predictions.csv): give the output_dir of a finished "
            "run, or a folder that python -m trainer.evaluate wrote"
        )
    try:
        told = json.loads(report[0])
        lines = csv.DictReader(io.StringIO(rows[0].decode()))
        answers = {line["file"]: (line["truth"], line["prediction"]) for line in lines}
        history = told.get("history") or _history(home)
        return Scored(name, address, told, answers, _configuration(home), history)
    except (ValueError, KeyError) as error:
        raise DataError(f"{folder} is damaged: {error}") from None


def _history(home: Place) -> list[dict[str, Any]]:
    """The epochs of a run whose report does not tell them."""
    found = (home / "metrics.jsonl").fetch()
    rows = [json.loads(line) for line in found[0].decode().splitlines()] if found else []
    return [row for row in rows if row["kind"] == "epoch"]


def _configuration(home: Place) -> dict[str, Any]:
    """Of the run; of an evaluation, that of the run two folders up, where it lies there."""
    for folder in (home, home.parent.parent):
        if found := (folder / "config.yaml").fetch():
            return dict(yaml.safe_load(found[0]))
    return {}


def names_of(addresses: Sequence[str]) -> list[str]:
    """The shortest last parts of addresses that tell them apart."""
    parts = [address.rstrip("/").split("/") for address in addresses]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return list(addresses)


def show(found: Comparison, console: Console) -> None:
    """The comparison on a terminal."""
    table = Table(title=f"on {len(found.files):,} shared examples", title_justify="left")
    table.add_column("run")
    for name in ("accuracy", "difference", "95 %", "only first", "only this", "p"):
        table.add_column(name, justify="right")
    table.add_column("")
    for place_of, (run, accuracy) in enumerate(zip(found.runs, found.accuracies, strict=True)):
        if place_of == 0:
            table.add_row(escape(run.name), f"{accuracy:.4f}", "", "", "", "", "", "")
            continue
        pair, p = found.pairs[place_of - 1], found.p[place_of - 1]
        low, high = pair.interval
        between = f"{low:+.4f} to {high:+.4f}"
        table.add_row(escape(run.name), f"{accuracy:.4f}", f"{pair.difference:+.4f}", between, f"{pair.lost:,}",
                      f"{pair.won:,}", f"{p:.3g}", verdict(pair, p))  # fmt: skip
    console.print(table)
    for key, values in configuration_differences(found.runs):
        console.print(f"  {key}: {' | '.join(values)}", markup=False, soft_wrap=True)


def _run(arguments: list[str]) -> None:
    if any(a.startswith("-") for a in arguments):
        print(__doc__)
        return
    outputs = [a.removeprefix("output=") for a in arguments if a.startswith("output=")]
    addresses = [a for a in arguments if not a.startswith("output=")]
    if len(addresses) < 2 or len(outputs) > 1 or len(set(addresses)) != len(addresses):
        raise ConfigError("name at least two runs, each once: python -m trainer.compare RUN RUN ... [output=FILE.html]")
    output = Path(outputs[0] if outputs else "compare.html").expanduser()
    if output.suffix != ".html":
        raise ConfigError(f"output={output}: give the name of a page, such as output=compare.html")
    runs = [read_scored(address, name) for address, name in zip(addresses, names_of(addresses), strict=True)]
    found = compare_runs(runs)
    show(found, Console(highlight=False, width=None if sys.stdout.isatty() else 120))
    write_comparison(output, found)
    say(f"page: {output}")


def main() -> None:
    """Entry point of `python -m trainer.compare`; exits with a documented code (`trainer.errors`)."""
    with exit_with_code():
        _run(sys.argv[1:])


if __name__ == "__main__":
    main()
