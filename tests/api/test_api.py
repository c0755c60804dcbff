"""The Python interface: configuration, commands in processes, and the notebook."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.errors import raises
from tests.processes import ROOT
from trainer import api
from trainer.api.processes import find_reason, run_command
from trainer.api.result import Predictions, Report
from trainer.errors import WRONG_INPUT, ConfigError, DataError

REPORT = {
    "title": "<script>alert(1)</script>", "figures": {"curves": "curves.png"},
    "test": {"split": "test", "accuracy": 0.5, "interval": [0.25, 0.75], "n": 10, "macro_f1": 0.5},
}  # fmt: skip


def test_load_is_the_configuration_of_the_command_line() -> None:
    config = api.load("experiment=quickstart", "phases.head.epochs=3", "output_dir=runs/a b=1")
    assert (config.phases["head"].epochs, config.output_dir) == (3, "runs/a b=1")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [(("-m", "seed=1,2"), "-m"), (("--help",), "--help"), (("traning.batch_size=8",), "traning"), (("model=nonsense",), "model")],
)  # fmt: skip
def test_what_is_wrong_is_a_configuration_error(overrides: tuple[str, ...], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        api.load(*overrides)
    with pytest.raises(ConfigError, match=key):
        api.train(*overrides)


def test_a_command_that_fails_has_its_code_and_reason() -> None:
    with pytest.raises(api.CommandFailed, match=r"reference=nowhere: has no reference\.json") as failed:
        run_command("trainer.drift", ["reference=nowhere", "log=x"], show_log=False)
    assert failed.value.exit_code == WRONG_INPUT


def test_the_reason_is_the_last_message() -> None:
    assert find_reason(["a", "error: b has 2 errors:", "  c", "  d"]) == "b has 2 errors:\n  c\n  d"
    assert find_reason(["interrupted: SIGTERM"]) == "SIGTERM"
    assert find_reason(["x", "y", "z", "Killed"]) == "y\nz\nKilled"
    assert find_reason([]) == ""


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with raises(DataError, key="run", value=str(tmp_path), problem="has no config.yaml"):
        api.open_run(tmp_path)


def test_a_report_is_a_mapping_with_its_figures_inline(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "curves.png")
    report = Report(str(tmp_path), REPORT)
    assert (report["test"]["n"], len(report), report.path) == (10, 3, f"{tmp_path}/index.html")
    html = report._repr_html_()
    assert "<script>" not in html
    assert html.count("data:image/png;base64,iVBOR") == 1


def test_predictions_are_a_table_in_a_notebook() -> None:
    probabilities = np.array([[0.25, 0.75], [np.nan, np.nan]], np.float32)
    pixels = np.zeros((8, 8, 3), np.uint8)
    predicted = Predictions(
        ("<b>.png", "no.png"), ("a", "b<i>"), probabilities, np.full(2, np.nan), {1: "is <empty>"}, lambda _: pixels
    )
    assert (predicted.labels, len(predicted)) == (["b<i>", None], 2)
    assert predicted.confidences[0] == np.float32(0.75)
    html = predicted._repr_html_()
    assert ("<b>" in html, "<i>" in html, "<empty>" in html, html.count("<img")) == (False, False, False, 1)
    assert "0.750" in html


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_cells_of_the_notebook_run_in_order(tmp_path: Path) -> None:
    """In one process of plain Python, where the value of the last line of a cell is displayed as a notebook does."""
    notebook = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())
    assert notebook["nbformat"] == 4
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    program = """
import ast, json, sys
space = {"__name__": "__main__"}
for number, source in enumerate(json.loads(sys.stdin.read())):
    tree, value = ast.parse(source), None
    if isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)
        exec(compile(tree, f"cell {number}", "exec"), space)
        value = eval(compile(last, f"cell {number}", "eval"), space)
    else:
        exec(compile(tree, f"cell {number}", "exec"), space)
    html = value._repr_html_() if hasattr(value, "_repr_html_") else ""
    print("CELL", json.dumps([repr(value)[:2000], html]))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CONFIG": '{"cluster": {"worker": ["a:1", "b:1"]}}'}
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(cells), cwd=tmp_path, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = [json.loads(line.removeprefix("CELL ")) for line in done.stdout.splitlines() if line.startswith("CELL ")]
    assert len(outputs) == len(cells) >= 5
    texts, pages = [text for text, _ in outputs], [html for _, html in outputs]
    assert "test accuracy" in done.stdout  # the log of the run
    assert any("test accuracy <strong>0." in html and html.count("data:image/png") == 2 for html in pages)
    assert any("'val_accuracy': [" in text for text in texts)
    assert any("<th>prediction</th>" in html and html.count("<img") >= 5 for html in pages)
    result = api.open_run(tmp_path / "outputs" / "digits")
    assert result.report["test"]["n"] == 90
    assert result.report.probabilities.shape == (90, 10)
    assert result.curves["phase"] == ["head", "fine_tune"]
    with pytest.raises(api.CommandFailed, match="split=holdout"):
        result.evaluate(split="holdout")
