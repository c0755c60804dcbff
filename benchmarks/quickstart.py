"""What transfer is worth on the quickstart's digits: `python -m benchmarks.quickstart` writes the table of its page.

Every run is a process of its own, started by the command line that anyone would type. A row differs from the next only
in `model.weights`; the simple methods see the same images, the same labelled ones where only few are labelled.
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

from trainer.cli.process import quiet_start
from trainer.config.schema import Data
from trainer.data.open import open_dataset
from trainer.data.records import RecordAt, index_shard, read_image
from trainer.evaluation.intervals import wilson
from trainer.types import Dataset, Split

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "quickstart.md"
CACHE = Path(os.environ.get("KUBETUNE_CACHE", "~/.cache/kubetune")).expanduser()
BEGIN, END = "<!-- table: python -m benchmarks.quickstart -->", "<!-- end of table -->"

# Labelled training images a class, and what the command line adds. With 100 images an epoch has 4 steps: the head gets
# more epochs, so that its 160 steps come near the 200 of the whole data; chosen by the validation split of seed 1.
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
    """Right answers on the test split, and the seconds that getting there took."""

    correct: int
    n: int
    seconds: float  # wall clock of the whole process; of fit and predict for the simple methods


Cell = tuple[int | None, str, str]  # labels a class, row, column
Results = dict[Cell, list[Score]]


def open_digits(labels_per_class: int | None, seed: int) -> Dataset:
    """The very data of a run with these two settings."""
    data = Data(source="digits", labels_per_class=labels_per_class)
    return open_dataset(data, seed=seed, cache_dir=CACHE, max_examples=None, note=lambda _: None)


def images_of(split: Split) -> np.ndarray:
    """The stored images of a split in the order of its labels: uint8 [n, 8, 8]."""
    images = []
    for shard in split.shards:
        index = index_shard(shard.path)
        for number in range(shard.start, shard.stop):
            offset, length = int(index.offsets[number]), int(index.lengths[number])
            encoded = read_image(RecordAt(shard.path, number, offset, length, split.image_field))
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
        answers = method.fit(train, splits["train"].labels).predict(test)
        correct = int((answers == splits["test"].labels).sum())
        scores[name] = Score(correct, len(answers), time.monotonic() - began)
    return scores


def write_fitted_random(path: Path, labels_per_class: int | None, seed: int) -> None:
    """A random backbone that lets a signal through, as a weights file.

    As Keras makes it, every BatchNormalization starts with mean 0 and variance 1; with random kernels the signal then
    dies on its way through 50 layers, and nothing can be learned while the statistics stay frozen. Here they become
    those of the training images of the run (without their labels), in one pass with momentum 0.
    """
    with quiet_start():
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
    """One run in a process of its own.

    Raises:
        SystemExit: the run failed; with its command and the end of what it said.
    """
    with tempfile.TemporaryDirectory(dir=home) as output:
        asked = ["experiment=quickstart", *arguments, f"seed={seed}", "export.formats=[]", f"output_dir={output}/run"]
        command = [sys.executable, "-m", "trainer", *asked]
        began = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{shlex.join(command)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}")
        test = json.loads(Path(output, "run", "report", "report.json").read_text())["test"]
        return Score(test["correct"], test["n"], time.monotonic() - began)


def measure(seeds: Sequence[int], home: Path) -> Results:
    """Every run and every simple method, one line each as it ends."""
    results: Results = {}
    began = time.monotonic()
    # The last row stays at chance, whatever the seed: one of them is enough.
    plan = [(few, row, s) for few in SETTINGS for row in ROWS for s in (seeds[:1] if row == NONE else seeds)]
    total, done = 2 * len(plan), 0
    for few, row, seed in plan:
        weights = row
        if row == FITTED:
            weights = str(home / f"random-{few}-{seed}.weights.h5")
            write_fitted_random(Path(weights), few, seed)
        for column, extra in (("head only", HEAD_ONLY), ("fine-tuned", [])):
            kept = [a for a in SETTINGS[few] if not (extra and a.startswith("phases.fine_tune"))]
            score = train([f"model.weights={weights}", *kept, *extra], seed, home)
            results.setdefault((few, row, column), []).append(score)
            done += 1
            left = (time.monotonic() - began) / done * (total - done) / 60
            _say(few, f"{row}, {column}", seed, score, f"run {done}/{total}, about {left:.0f} min left")
    for few in SETTINGS:
        for seed in seeds:
            for name, score in simple_methods(few, seed).items():
                results.setdefault((few, name, "simple"), []).append(score)
                _say(few, name, seed, score, "")
    return results


def _say(few: int | None, what: str, seed: int, score: Score, progress: str) -> None:
    labels = f"{few} labels a class" if few else "all labels"
    accuracy = f"test {score.correct}/{score.n} = {score.correct / score.n:.4f} in {score.seconds:.1f} s"
    print(f"{labels}, {what}, seed {seed}: {accuracy}  {progress}".rstrip(), flush=True)


def cell(scores: Sequence[Score]) -> str:
    """Mean accuracy, the 95 % interval around it (n of one test split), and each seed's own where they differ."""
    n = scores[0].n
    mean = statistics.mean(score.correct for score in scores)
    low, high = wilson(round(mean), n)
    each = [f"{score.correct / n:.3f}" for score in scores]
    seeds = f"; {' '.join(each)}" if len(set(each)) > 1 else "; 1 seed" if len(each) == 1 else ""
    return f"**{mean / n:.3f}** [{low:.3f}, {high:.3f}]{seeds}"


def table(results: Results) -> str:
    """The Markdown table of all results."""
    lines = ["| labels | | head only | fine-tuned | seconds of a run |", "| --- | --- | --- | --- | --- |"]
    for few in SETTINGS:
        labels = f"{few} a class" if few else "all 1,257"
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
    """Measure, print the table, and put it between its two marks in the page."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--seeds", type=int, default=3, help="seeds 1 to this (default: 3)")
    options.add_argument("--out", type=Path, default=PAGE, help="page whose table is replaced (default: %(default)s)")
    asked = options.parse_args()
    if asked.seeds < 1:
        options.error("--seeds must be at least 1")
    page = asked.out.read_text()
    if BEGIN not in page or END not in page:
        options.error(f"{asked.out} has no lines {BEGIN} and {END} to put the table between")
    with tempfile.TemporaryDirectory() as home:
        made = table(measure(range(1, asked.seeds + 1), Path(home)))
    print(f"\n{made}")
    marks = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    asked.out.write_text(marks.sub(lambda _: f"{BEGIN}\n\n{made}\n\n{END}", page))


if __name__ == "__main__":
    main()
