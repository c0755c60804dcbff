"""Reading the reports of runs to compare, and the comparison on a terminal."""

import csv
import io
import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trainer.config.schema import read_config
from trainer.errors import DataError
from trainer.report.compare import Comparison, Scored, configuration_differences, verdict
from trainer.storage.path import StoragePath, storage_path


def read_scored(address: str, name: str) -> Scored:
    """Read the report of a run or an evaluation, with the predictions beside it.

    Raises:
        DataError: there is none, or it is damaged.
    """
    root = storage_path(address)
    folder = root if (root / "report.json").exists() else root / "report"
    content, rows = (folder / "report.json").fetch(), (folder / "predictions.csv").fetch()
    if content is None or rows is None:
        raise DataError(
            f"{address} holds no report (report/report.json and predictions.csv): give the output_dir of a finished "
            "run, or a folder that python -m trainer.evaluate wrote"
        )
    try:
        report = json.loads(content[0])
        lines = csv.DictReader(io.StringIO(rows[0].decode()))
        answers = {line["file"]: (line["truth"], line["prediction"]) for line in lines}
        history = report.get("history") or _history(root)
        return Scored(name, address, report, answers, _configuration(root), history)
    except (ValueError, KeyError) as error:
        raise DataError(f"{folder} is damaged: {error}") from None


def _history(root: StoragePath) -> list[dict[str, Any]]:
    """The epochs of a run whose report lacks them."""
    metrics = (root / "metrics.jsonl").fetch()
    rows = [json.loads(line) for line in metrics[0].decode().splitlines()] if metrics else []
    return [row for row in rows if row["kind"] == "epoch"]


def _configuration(root: StoragePath) -> dict[str, Any]:
    """The configuration of a run; for an evaluation that of the run two folders up, if there is one."""
    for folder in (root, root.parent.parent):
        if content := (folder / "config.yaml").fetch():
            return read_config(content[0])
    return {}


def names_of(addresses: Sequence[str]) -> list[str]:
    """The shortest last parts of addresses that are all different."""
    parts = [address.rstrip("/").split("/") for address in addresses]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return list(addresses)


def show(comparison: Comparison) -> None:
    """Print the comparison as a table."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    table = Table(title=f"on {len(comparison.files):,} shared examples", title_justify="left")
    table.add_column("run")
    for name in ("accuracy", "difference", "95 %", "only first", "only this", "p"):
        table.add_column(name, justify="right")
    table.add_column("")
    rows = [
        [escape(run.name), f"{right.mean():.4f}"] for run, right in zip(comparison.runs, comparison.right, strict=True)
    ]
    for row, pair, p in zip(rows[1:], comparison.pairs, comparison.p, strict=True):
        between = "{:+.4f} to {:+.4f}".format(*pair.interval)
        row += [f"{pair.difference:+.4f}", between, f"{pair.lost:,}", f"{pair.won:,}", f"{p:.3g}", verdict(pair, p)]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for key, values in configuration_differences(comparison.runs):
        console.print(f"  {key}: {' | '.join(values)}", markup=False, soft_wrap=True)
