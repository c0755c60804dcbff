"""Runs to compare: reading what each has reported, and the comparison on a terminal."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trainer.errors import DataError
from trainer.report.compare import Comparison, Scored, configuration_differences, verdict
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


def show(found: Comparison) -> None:
    """Print the comparison as a table."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
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
