"""Labels that are wrong on purpose are listed by the report, corrected in its page, and right in the next run."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.e2e.running import train
from tests.evaluation.browser import Tab

SWAPPED = 20


def write_digits(root: Path) -> dict[str, str]:
    """Write 1,000 digits as a folder with splits, 20 of 300 test digits in a wrong class; return their right classes."""
    digits, truth = load_digits(), {}
    order = random.Random(1).sample(range(len(digits.target)), 1000)
    for k, i in enumerate(order):
        split, label = "train" if k < 600 else "validation" if k < 700 else "test", int(digits.target[i])
        shown = (label + 1 + k % 9) % 10 if k >= 1000 - SWAPPED else label
        file = root / split / str(shown) / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(digits.images[i] * 255 / 16).astype(np.uint8)).save(file)
        if shown != label:
            truth[str(file)] = str(label)
    return truth


def scores(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "report" / "report.json").read_text()))


@pytest.mark.slow
@pytest.mark.browser
def test_swapped_labels_are_listed_corrected_in_the_page_and_right_in_the_next_run(tab: Tab, tmp_path: Path) -> None:
    truth = write_digits(tmp_path / "digits")
    arguments = (
        "experiment=quickstart", "data=image_folder", f"data.root={tmp_path / 'digits'}", "augmentation=none",
        "phases.head.epochs=5", "phases.fine_tune.epochs=5", "export.formats=[]",
    )  # fmt: skip
    train(*arguments, f"output_dir={tmp_path / 'first'}")
    first = scores(tmp_path / "first")
    tab.open(tmp_path / "first" / "report" / "index.html")
    tab.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    # A user inspects the list, and confirms the suggestions that are right.
    right = {row["file"]: row["suggestion"] for row in first["label_errors"]["rows"]}
    right = {file: suggestion for file, suggestion in right.items() if truth.get(file) == suggestion}
    assert len(right) >= 14
    for file in right:
        tab.run(
            f"(() => {{ const mark = [...document.querySelectorAll('#possible-label-errors .correct')].find("
            f"m => m.dataset.file === {json.dumps(file)}); mark.firstChild.value = 'suggested'; "
            "mark.firstChild.dispatchEvent(new Event('change')); })()"
        )
    tab.click("#corrections [data-does=save]")
    saved = tmp_path / "corrections.csv"
    tab.run(f"new Promise(done => setTimeout(done, {2000}))")
    assert saved.read_text().count("\n") == len(right) + 1

    done = train(*arguments, f"output_dir={tmp_path / 'second'}", f"data.corrections={saved}")
    assert f"corrections: 0 excluded, {len(right)} relabelled ({saved})" in done.stdout
    second = scores(tmp_path / "second")
    for name, report in (("before", first), ("after", second)):
        low, high = report["test"]["interval"]
        print(f"{name}: {report['test']['accuracy']:.3f} ({low:.3f} to {high:.3f}, n = {report['test']['n']})")
    # The training data is the same, so the predictions are, and only the corrected labels are scored otherwise.
    assert second["test"]["correct"] == first["test"]["correct"] + len(right)
    assert second["label_errors"]["count"] < first["label_errors"]["count"]
    assert second["data"]["counts"] == first["data"]["counts"] == {"train": 600, "validation": 100, "test": 300}
    other = ("data.corrections=null", f"output_dir={tmp_path / 'second'}", "resume=must", "phases.fine_tune.epochs=6")
    refused = train(*arguments, *other, code=2)
    assert f"data.corrections: {saved} -> None" in refused.stderr
