"""Measure the benefit of transfer learning on the quickstart's digits, and write the table in docs/quickstart.md.

    python -m benchmarks.quickstart

Each run is a separate process of `python -m trainer`. Rows differ only in `model.weights`. The simple methods of
scikit-learn train on the same labelled images.
"""

import argparse
import io
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from trainer.cli.process import suppress_import_noise
from trainer.config.schema import Data
from trainer.data.open import open_dataset
from trainer.data.records import RecordLocation, index_shard, read_image
from trainer.evaluation.intervals import compute_wilson_interval
from trainer.types import Dataset, Split

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "quickstart.md"
CACHE = Path(os.environ.get("KUBETUNE_CACHE", "~/.cache/kubetune")).expanduser()
BEGIN, END = "<!-- table: python -m benchmarks.quickstart -->", "<!-- end of table -->"

# Labelled training images per class (None: all) -> additional arguments. With 10 per class, an epoch has 4 steps, so
# the head trains for more epochs: 160 steps, compared with 200 for all labels. Chosen on seed 1's validation split.
SETTINGS: dict[int | None, list[str]] = {
    None: [],
    10: ["data.labels_per_class=10", "phases.head.epochs=40", "phases.fine_tune.epochs=60"],
}
HEAD_ONLY = ["~phases.fine_tune"]
GLYPHS, FITTED, NONE = "glyphs", "random, statistics fitted", "none"
ROWS = {
    GLYPHS: "packaged weights",
    FITTED: "random weights, BatchNorm fitted",
    NONE: "random weights as Keras draws them",
}


@dataclass(frozen=True)
class Score:
    """Correct predictions on the test split, and the seconds of training and prediction."""

    correct: int
    n: int
    seconds: float  # duration of the process; for the simple methods, duration of fit and predict


Cell = tuple[int | None, str, str]  # labels per class, row, column
Results = dict[Cell, list[Score]]


def open_digits(labels_per_class: int | None, seed: int) -> Dataset:
    """Open the dataset of a run with this configuration."""
    data = Data(source="digits", labels_per_class=labels_per_class)
    return open_dataset(data, seed=seed, cache_dir=CACHE, max_examples=None, log_message=lambda _: None)


def read_images(split: Split) -> np.ndarray:
    """Read the images of a split in the order of its labels, uint8 [n, 8, 8]."""
    images = []
    for shard in split.shards:
        index = index_shard(shard.path)
        for number in range(shard.start, shard.stop):
            offset, length = int(index.offsets[number]), int(index.lengths[number])
            encoded = read_image(RecordLocation(shard.path, number, offset, length, split.image_field))
            images.append(np.asarray(Image.open(io.BytesIO(encoded))))
    return np.stack(images)


def score_simple_methods(labels_per_class: int | None, seed: int) -> dict[str, Score]:
    """Fit scikit-learn's simple methods to the training images' pixels (0..1), and score them on the test split."""
    splits = open_digits(labels_per_class, seed).splits
    train_pixels, test_pixels = (
        read_images(splits[name]).reshape(splits[name].count, -1) / 255 for name in ("train", "test")
    )
    scores = {}
    for name, method in {
        "logistic regression on pixels": LogisticRegression(max_iter=5000),
        "logistic regression on standardised pixels": make_pipeline(
            StandardScaler(), LogisticRegression(max_iter=5000)
        ),
        "3 nearest neighbours on pixels": KNeighborsClassifier(3),
        "1 nearest neighbour on pixels": KNeighborsClassifier(1),
        "support vectors (RBF, C=10) on pixels": SVC(C=10),
    }.items():
        started_at = time.monotonic()
        predictions = method.fit(train_pixels, splits["train"].labels).predict(test_pixels)
        correct = int((predictions == splits["test"].labels).sum())
        scores[name] = Score(correct, len(predictions), time.monotonic() - started_at)
    return scores


def write_fitted_random_weights(path: Path, labels_per_class: int | None, seed: int) -> None:
    """Write the weights of a random backbone whose BatchNormalization statistics are fitted to the training images.

    With the default statistics (mean 0, variance 1) and random kernels, the signal vanishes within 50 layers, so that
    nothing can be learned while the statistics are frozen. Here they are computed in one pass with momentum 0, without
    using labels.
    """
    with suppress_import_noise():
        import keras

    keras.utils.set_random_seed(seed)
    model = keras.applications.MobileNetV2(input_shape=(48, 48, 3), alpha=0.35, include_top=False, weights=None)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    images = read_images(open_digits(labels_per_class, seed).splits["train"])[..., None]
    large = keras.ops.image.resize(np.repeat(images, 3, axis=-1).astype(np.float32), (48, 48))
    model(large / 127.5 - 1, training=True)
    model.save_weights(path)


def train_and_score(arguments: Sequence[str], seed: int, scratch: Path) -> Score:
    """Train in a separate process, and return the score on the test split. `scratch` is a folder for its output.

    Raises:
        SystemExit: the run failed. The message has its command and the end of its output.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as output:
        options = ["experiment=quickstart", *arguments, f"seed={seed}", "export.formats=[]", f"output_dir={output}/run"]
        command = [sys.executable, "-m", "trainer", *options]
        started_at = time.monotonic()
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if process.returncode:
            sys.exit(
                f"{shlex.join(command)} ended with {process.returncode}:\n{(process.stdout + process.stderr)[-2000:]}"
            )
        test = json.loads(Path(output, "run", "report", "report.json").read_text())["test"]
        return Score(test["correct"], test["n"], time.monotonic() - started_at)


def measure(seeds: Sequence[int], scratch: Path) -> Results:
    """Train all runs, fit all simple methods, and print a line for each. `scratch` is a folder for temporary files."""
    results: Results = {}
    started_at = time.monotonic()
    # The accuracy of the last row is at chance level with every seed, so one seed is enough.
    plan = [
        (labels_per_class, row, s)
        for labels_per_class in SETTINGS
        for row in ROWS
        for s in (seeds[:1] if row == NONE else seeds)
    ]
    total, num_done = 2 * len(plan), 0
    for labels_per_class, row, seed in plan:
        weights = row
        if row == FITTED:
            weights = str(scratch / f"random-{labels_per_class}-{seed}.weights.h5")
            write_fitted_random_weights(Path(weights), labels_per_class, seed)
        for column, extra in (("head only", HEAD_ONLY), ("fine-tuned", [])):
            settings = [a for a in SETTINGS[labels_per_class] if not (extra and a.startswith("phases.fine_tune"))]
            score = train_and_score([f"model.weights={weights}", *settings, *extra], seed, scratch)
            results.setdefault((labels_per_class, row, column), []).append(score)
            num_done += 1
            left = (time.monotonic() - started_at) / num_done * (total - num_done) / 60
            _report(
                labels_per_class, f"{row}, {column}", seed, score, f"run {num_done}/{total}, about {left:.0f} min left"
            )
    for labels_per_class in SETTINGS:
        for seed in seeds:
            for name, score in score_simple_methods(labels_per_class, seed).items():
                results.setdefault((labels_per_class, name, "simple"), []).append(score)
                _report(labels_per_class, name, seed, score, "")
    return results


def _report(labels_per_class: int | None, what: str, seed: int, score: Score, progress: str) -> None:
    labels = f"{labels_per_class} labels per class" if labels_per_class else "all labels"
    accuracy = f"test {score.correct}/{score.n} = {score.correct / score.n:.4f} in {score.seconds:.1f} s"
    print(f"{labels}, {what}, seed {seed}: {accuracy}  {progress}".rstrip(), flush=True)


def format_cell(scores: Sequence[Score]) -> str:
    """Format the mean accuracy, its 95 % interval (for the n of one split), and the accuracies of seeds that differ."""
    n = scores[0].n
    mean = statistics.mean(score.correct for score in scores)
    low, high = compute_wilson_interval(round(mean), n)
    accuracies = [f"{score.correct / n:.3f}" for score in scores]
    seeds = f"; {' '.join(accuracies)}" if len(set(accuracies)) > 1 else "; 1 seed" if len(accuracies) == 1 else ""
    return f"**{mean / n:.3f}** [{low:.3f}, {high:.3f}]{seeds}"


def format_table(results: Results) -> str:
    """Format the Markdown table of all results."""
    lines = ["| labels | | head only | fine-tuned | seconds of a run |", "| --- | --- | --- | --- | --- |"]
    for labels_per_class in SETTINGS:
        labels = f"{labels_per_class} per class" if labels_per_class else "all 1,257"
        for row, title in ROWS.items():
            cells = [results[labels_per_class, row, column] for column in ("head only", "fine-tuned")]
            seconds = " / ".join(f"{statistics.median(s.seconds for s in scores):.0f}" for scores in cells)
            lines.append(f"| {labels} | {title} | {format_cell(cells[0])} | {format_cell(cells[1])} | {seconds} |")
        for name in dict.fromkeys(row for f, row, column in results if f == labels_per_class and column == "simple"):
            scores = results[labels_per_class, name, "simple"]
            median_seconds = statistics.median(score.seconds for score in scores)
            lines.append(f"| {labels} | {name} | | {format_cell(scores)} | {median_seconds:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, and insert it between the two markers in the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to this (default: 3)")
    parser.add_argument("--out", type=Path, default=PAGE, help="page whose table is replaced (default: %(default)s)")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds={options.seeds}: must be at least 1")
    page = options.out.read_text()
    if BEGIN not in page or END not in page:
        parser.error(f"--out={options.out}: has no lines {BEGIN} and {END}; add them where the table belongs")
    with tempfile.TemporaryDirectory() as scratch:
        text = format_table(measure(range(1, options.seeds + 1), Path(scratch)))
    print(f"\n{text}")
    marks = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    options.out.write_text(marks.sub(lambda _: f"{BEGIN}\n\n{text}\n\n{END}", page))


if __name__ == "__main__":
    main()
