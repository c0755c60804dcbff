"""The benefit of transfer learning on the quickstart's digits, as the table of docs/quickstart.md.

    python -m benchmarks.quickstart

Every run is a separate process of the command line. Rows differ only in `model.weights`; the simple methods train on
the same images, with the same labels where only few are labelled.
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

# Labelled training images per class, and additional arguments. With 100 images an epoch has 4 steps: the head gets more
# epochs, so that its 160 steps are close to the 200 of the whole data; chosen by the validation split of seed 1.
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
    seconds: float  # wall clock of the whole process; of fit and predict for the simple methods


Cell = tuple[int | None, str, str]  # labels per class, row, column
Results = dict[Cell, list[Score]]


def open_digits(labels_per_class: int | None, seed: int) -> Dataset:
    """The dataset of a run with these two settings."""
    data = Data(source="digits", labels_per_class=labels_per_class)
    return open_dataset(data, seed=seed, cache_dir=CACHE, max_examples=None, log_message=lambda _: None)


def images_of(split: Split) -> np.ndarray:
    """The stored images of a split in the order of its labels: uint8 [n, 8, 8]."""
    images = []
    for shard in split.shards:
        index = index_shard(shard.path)
        for number in range(shard.start, shard.stop):
            offset, length = int(index.offsets[number]), int(index.lengths[number])
            encoded = read_image(RecordLocation(shard.path, number, offset, length, split.image_field))
            images.append(np.asarray(Image.open(io.BytesIO(encoded))))
    return np.stack(images)


def simple_methods(labels_per_class: int | None, seed: int) -> dict[str, Score]:
    """Fit the simple methods on the training pixels (0..1), score them on the test split."""
    splits = open_digits(labels_per_class, seed).splits
    train, test = (images_of(splits[name]).reshape(splits[name].count, -1) / 255 for name in ("train", "test"))
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
        began = time.monotonic()
        predictions = method.fit(train, splits["train"].labels).predict(test)
        correct = int((predictions == splits["test"].labels).sum())
        scores[name] = Score(correct, len(predictions), time.monotonic() - began)
    return scores


def write_fitted_random(path: Path, labels_per_class: int | None, seed: int) -> None:
    """Write the weights of a random backbone with fitted BatchNormalization statistics.

    By default every BatchNormalization starts with mean 0 and variance 1; with random kernels the signal then vanishes
    within 50 layers, and nothing can be learned while the statistics are frozen. Here they are those of the training
    images of the run (without their labels), from one pass with momentum 0.
    """
    with suppress_import_noise():
        import keras

    keras.utils.set_random_seed(seed)
    model = keras.applications.MobileNetV2(input_shape=(48, 48, 3), alpha=0.35, include_top=False, weights=None)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    images = images_of(open_digits(labels_per_class, seed).splits["train"])[..., None]
    large = keras.ops.image.resize(np.repeat(images, 3, axis=-1).astype(np.float32), (48, 48))
    model(large / 127.5 - 1, training=True)
    model.save_weights(path)


def train(arguments: Sequence[str], seed: int, home: Path) -> Score:
    """Train in a separate process.

    Raises:
        SystemExit: the run failed; with its command and the end of its output.
    """
    with tempfile.TemporaryDirectory(dir=home) as output:
        options = ["experiment=quickstart", *arguments, f"seed={seed}", "export.formats=[]", f"output_dir={output}/run"]
        command = [sys.executable, "-m", "trainer", *options]
        began = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{shlex.join(command)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}")
        test = json.loads(Path(output, "run", "report", "report.json").read_text())["test"]
        return Score(test["correct"], test["n"], time.monotonic() - began)


def measure(seeds: Sequence[int], home: Path) -> Results:
    """Train every run and fit every simple method; prints one line for each."""
    results: Results = {}
    began = time.monotonic()
    # The last row is at chance level with every seed: one seed is enough.
    plan = [(few, row, s) for few in SETTINGS for row in ROWS for s in (seeds[:1] if row == NONE else seeds)]
    total, done = 2 * len(plan), 0
    for few, row, seed in plan:
        weights = row
        if row == FITTED:
            weights = str(home / f"random-{few}-{seed}.weights.h5")
            write_fitted_random(Path(weights), few, seed)
        for column, extra in (("head only", HEAD_ONLY), ("fine-tuned", [])):
            settings = [a for a in SETTINGS[few] if not (extra and a.startswith("phases.fine_tune"))]
            score = train([f"model.weights={weights}", *settings, *extra], seed, home)
            results.setdefault((few, row, column), []).append(score)
            done += 1
            left = (time.monotonic() - began) / done * (total - done) / 60
            _report(few, f"{row}, {column}", seed, score, f"run {done}/{total}, about {left:.0f} min left")
    for few in SETTINGS:
        for seed in seeds:
            for name, score in simple_methods(few, seed).items():
                results.setdefault((few, name, "simple"), []).append(score)
                _report(few, name, seed, score, "")
    return results


def _report(few: int | None, what: str, seed: int, score: Score, progress: str) -> None:
    labels = f"{few} labels per class" if few else "all labels"
    accuracy = f"test {score.correct}/{score.n} = {score.correct / score.n:.4f} in {score.seconds:.1f} s"
    print(f"{labels}, {what}, seed {seed}: {accuracy}  {progress}".rstrip(), flush=True)


def cell(scores: Sequence[Score]) -> str:
    """Mean accuracy, its 95 % interval (n of one test split), and the accuracy of each seed where they differ."""
    n = scores[0].n
    mean = statistics.mean(score.correct for score in scores)
    low, high = compute_wilson_interval(round(mean), n)
    each = [f"{score.correct / n:.3f}" for score in scores]
    seeds = f"; {' '.join(each)}" if len(set(each)) > 1 else "; 1 seed" if len(each) == 1 else ""
    return f"**{mean / n:.3f}** [{low:.3f}, {high:.3f}]{seeds}"


def table(results: Results) -> str:
    """The Markdown table of all results."""
    lines = ["| labels | | head only | fine-tuned | seconds of a run |", "| --- | --- | --- | --- | --- |"]
    for few in SETTINGS:
        labels = f"{few} per class" if few else "all 1,257"
        for row, title in ROWS.items():
            cells = [results[few, row, column] for column in ("head only", "fine-tuned")]
            seconds = " / ".join(f"{statistics.median(s.seconds for s in scores):.0f}" for scores in cells)
            lines.append(f"| {labels} | {title} | {cell(cells[0])} | {cell(cells[1])} | {seconds} |")
        for name in dict.fromkeys(row for f, row, column in results if f == few and column == "simple"):
            scores = results[few, name, "simple"]
            took = statistics.median(score.seconds for score in scores)
            lines.append(f"| {labels} | {name} | | {cell(scores)} | {took:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, and insert it between the two marks of the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to this (default: 3)")
    parser.add_argument("--out", type=Path, default=PAGE, help="page whose table is replaced (default: %(default)s)")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds={options.seeds}: must be at least 1")
    page = options.out.read_text()
    if BEGIN not in page or END not in page:
        parser.error(f"--out={options.out}: has no lines {BEGIN} and {END}; add them where the table belongs")
    with tempfile.TemporaryDirectory() as home:
        text = table(measure(range(1, options.seeds + 1), Path(home)))
    print(f"\n{text}")
    marks = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    options.out.write_text(marks.sub(lambda _: f"{BEGIN}\n\n{text}\n\n{END}", page))


if __name__ == "__main__":
    main()
