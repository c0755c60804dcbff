"""Drift of a model's inputs and predictions from a reference, in NumPy.

The reference, `export/reference.json`, is from a split that the model was not trained on. Three measures, each with a
limit that sampling alone exceeds in 1 of 100 cases at most:

- `classes`: the population stability index (PSI; Siddiqi 2006, "Credit Risk Scorecards") of the predicted classes;
- `confidence`: the PSI of the largest probability;
- `embedding`: the Frechet distance between Gaussians fitted to the embeddings (Dowson and Landau 1982; as in the
  Frechet inception distance of Heusel et al. 2017), as a fraction of the reference's own variance.
"""

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import numpy as np

from trainer.errors import DataError
from trainer.storage.path import storage_path

MODERATE, SHIFTED = 0.1, 0.25  # usual limits of a PSI
EMBEDDING_MODERATE, EMBEDDING_SHIFTED = 0.05, 0.1  # fractions of the reference's variance
QUANTILE = 0.99  # of samples without drift are below a limit
DRAWS = 200  # of the bootstrap
BINS = 20  # of the largest probability, over 0..1
MIN_FRACTION = 0.05  # of the reference per bin; smaller bins are merged

DESCRIPTIONS = {
    "classes": "population stability index of the predicted classes",
    "confidence": "population stability index of the largest probability",
    "embedding": "Frechet distance of the embeddings, as a fraction of the reference's variance",
}

Level = Literal["stable", "moderate", "shifted"]


@dataclass(frozen=True)
class Measure:
    """A measure of drift over n predictions; its level is moderate or shifted from these limits on."""

    name: str  # classes | confidence | embedding
    value: float
    moderate: float
    shifted: float
    n: int

    @property
    def level(self) -> Level:
        return "shifted" if self.value >= self.shifted else "moderate" if self.value >= self.moderate else "stable"


class Window:
    """Counts and moments of all predictions or of the last `size`. Not thread-safe."""

    def __init__(self, class_count: int, size: int | None = None) -> None:
        self.size = size
        self.classes = np.zeros(class_count, np.int64)
        self.confidences = np.zeros(BINS, np.int64)
        self.embedded = 0
        self._sum: Any = 0.0
        self._outer: Any = 0.0
        self._recent: deque[tuple[int, int, np.ndarray | None]] = deque()

    @property
    def n(self) -> int:
        return int(self.classes.sum())

    def add(self, chosen: int, confidence: float, embedding: Sequence[float] | np.ndarray | None = None) -> None:
        """Add a prediction: index of the class, its probability, and the projected embedding [C'] or None."""
        vector = None if embedding is None else np.asarray(embedding, np.float64)
        bin_ = min(max(int(confidence * BINS), 0), BINS - 1)
        self._count(chosen, bin_, vector, 1)
        if self.size is not None:
            self._recent.append((chosen, bin_, vector))
            if len(self._recent) > self.size:
                self._count(*self._recent.popleft(), -1)

    def _count(self, chosen: int, bin_: int, vector: np.ndarray | None, sign: int) -> None:
        self.classes[chosen] += sign
        self.confidences[bin_] += sign
        if vector is not None:
            self.embedded += sign
            self._sum = self._sum + sign * vector
            self._outer = self._outer + sign * np.outer(vector, vector)

    def gaussian(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean [C'] and covariance [C', C'] of the embeddings, at least 2."""
        assert self.embedded > 1, self.embedded
        mean = self._sum / self.embedded
        return mean, (self._outer - self.embedded * np.outer(mean, mean)) / (self.embedded - 1)


def population_stability(reference_counts: Sequence[float] | np.ndarray, counts: Sequence[float] | np.ndarray) -> float:
    """PSI = sum of (q - p) ln(q / p) over the frequencies of two histograms [bins]; 0 for equal ones.

    Half a count is added to every bin, so that an empty bin does not make it infinite.
    """
    filled = [np.asarray(c, np.float64) + 0.5 for c in (reference_counts, counts)]
    p, q = (bins / bins.sum() for bins in filled)
    return float(((q - p) * np.log(q / p)).sum())


def stability_limit(reference_n: int, n: int, bins: int) -> float:
    """The 0.99 quantile of the PSI of two samples of one distribution.

    About (1/m + 1/n) chi-squared with bins - 1 degrees of freedom (Yurdakul and Naranjo 2020, "Statistical
    properties of the population stability index"); the quantile of chi-squared is that of Wilson and Hilferty 1931.
    """
    degrees = max(bins - 1, 1)
    spread = 2 / (9 * degrees)
    quantile = degrees * (1 - spread + 2.3263 * spread**0.5) ** 3  # 2.3263: the 0.99 quantile of a normal
    return float((1 / max(reference_n, 1) + 1 / max(n, 1)) * quantile)


def merge_bins(reference: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge neighbouring bins of two histograms until each holds 5 % of the reference."""
    minimum, edges = MIN_FRACTION * reference.sum(), [0]
    for edge in range(1, len(reference) + 1):
        if min(reference[edges[-1] : edge].sum(), reference[edge:].sum()) >= minimum:
            edges.append(edge)
    return np.add.reduceat(reference, edges), np.add.reduceat(counts, edges)


def embedding_distance(
    reference: Mapping[str, Any], mean: Sequence[float] | np.ndarray, covariance: Sequence[Any] | np.ndarray
) -> float:
    """Squared Frechet distance between two Gaussians over the trace of the reference's covariance.

    (|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))) / tr(S1): 0 for equal ones, 1 where the mean has moved by as much as
    the reference varies.

    Args:
        reference: `mean` [C'] and `covariance` [C', C'], as `embedding` of reference.json.
    """
    m1, s1 = np.asarray(reference["mean"], np.float64), np.asarray(reference["covariance"], np.float64)
    m2, s2 = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    half = _root(s1)
    # tr((S1 S2)^(1/2)) = tr((S1^(1/2) S2 S1^(1/2))^(1/2)), of a symmetric matrix
    between = np.sqrt(np.maximum(np.linalg.eigvalsh(half @ s2 @ half), 0.0)).sum()
    distance = ((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * between
    return float(max(distance, 0.0) / max(np.trace(s1), 1e-12))


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def distance_limit(reference: Mapping[str, Any], reference_n: int, n: int, seed: int = 0) -> float:
    """The 0.99 quantile of the distance of `n` embeddings without drift.

    A parametric bootstrap (Efron and Tibshirani 1993, chapter 6): pairs of samples, of `reference_n` and `n`, are
    drawn from the reference's own Gaussian.
    """
    mean, covariance = np.asarray(reference["mean"], np.float64), np.asarray(reference["covariance"], np.float64)
    half, draw, width = _root(covariance), np.random.default_rng(seed), len(mean)

    def gaussian(count: int) -> tuple[np.ndarray, np.ndarray]:
        count = max(count, 2)
        if count <= width:
            sample = draw.standard_normal((count, width)) @ half
            return mean + sample.mean(0), np.cov(sample, rowvar=False).reshape(width, width)
        factor = np.tril(draw.standard_normal((width, width)), -1)  # Bartlett 1933: a Wishart matrix without a sample
        factor += np.diag(np.sqrt(draw.chisquare(count - 1 - np.arange(width))))
        spread = half @ factor
        return mean + half @ draw.standard_normal(width) / np.sqrt(count), spread @ spread.T / (count - 1)

    distances = []
    for _ in range(DRAWS):
        own_mean, own_covariance = gaussian(reference_n)
        distances.append(embedding_distance({"mean": own_mean, "covariance": own_covariance}, *gaussian(n)))
    return float(np.quantile(distances, QUANTILE))


def measures(reference: Mapping[str, Any], window: Window) -> list[Measure]:
    """Measure the drift of a window of predictions; `embedding` is left out without embeddings."""
    assert window.n > 0, "no predictions"
    count = int(reference["n"])
    expected = np.asarray(reference["class_frequencies"], np.float64) * count
    binned = merge_bins(np.asarray(reference["confidence_histogram"]["counts"], np.float64), window.confidences)
    measured = []
    for name, (before, now) in {"classes": (expected, window.classes), "confidence": binned}.items():
        limit, value = stability_limit(count, window.n, len(now)), population_stability(before, now)
        measured.append(Measure(name, value, max(MODERATE, limit), max(SHIFTED, limit), window.n))
    if "embedding" in reference and window.embedded > 1:
        own = reference["embedding"]
        limit = distance_limit(own, int(own.get("n", count)), window.embedded)
        moderate, shifted = max(EMBEDDING_MODERATE, limit), max(EMBEDDING_SHIFTED, limit)
        value = embedding_distance(own, *window.gaussian())
        measured.append(Measure("embedding", value, moderate, shifted, window.embedded))
    return measured


def verdict(measured: Sequence[Measure]) -> Level:
    """The worst of the levels."""
    return max((measure.level for measure in measured), key=("stable", "moderate", "shifted").index)


def parse_reference(content: bytes, classes: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Parse reference.json of a model with these classes (by default its own); None if it is damaged."""
    try:
        reference: dict[str, Any] = json.loads(content)
        counts = reference["confidence_histogram"]["counts"]
        names = reference["classes"] if classes is None else classes
        valid = len(reference["class_frequencies"]) == len(names) and len(counts) == BINS and reference["n"] > 0
    except (ValueError, KeyError, TypeError):
        return None
    return reference if valid else None


def read_reference(address: str) -> dict[str, Any]:
    """Read the reference.json of a run, an export or a SavedModel, or the file itself.

    Raises:
        DataError: it does not exist or is damaged.
    """
    root = storage_path(address)
    below = ("export/reference.json", "reference.json", "assets/reference.json", "saved_model/1/assets/reference.json")
    files = [root] if address.endswith(".json") else [root / name for name in below]
    fetched = next((content for file in files if (content := file.fetch())), None)
    if fetched is None:
        raise DataError(
            "has no reference.json", key="reference", value=address, fix="give an exported run, or the file itself"
        )
    if (reference := parse_reference(fetched[0])) is None:
        raise DataError("its reference.json is damaged", key="reference", value=address, fix="export the run again")
    return reference


def read_log(address: str, reference: Mapping[str, Any], hours: float | None) -> tuple[Window, int]:
    """Read the predictions of a log or of all logs in a folder, and count invalid lines (the last may be unfinished).

    Args:
        hours: only the predictions of the last `hours`; None: all of them.

    Raises:
        DataError: there is no log, it has no predictions, or they are from another model.
    """
    root = storage_path(address)
    files = [root] if root.exists() else [e.path for e in root.list(recursive=False) if e.path.name.endswith(".jsonl")]
    if not files:
        raise DataError("no such file or folder with *.jsonl", key="log", value=address, fix="give the log of a server")
    lines = (line for file in sorted(files, key=str) for line in file.read().decode("utf-8", "replace").splitlines())
    since = datetime.now(UTC) - timedelta(hours=hours) if hours else None
    positions = {name: i for i, name in enumerate(reference["classes"])}
    width = len(reference["embedding"]["mean"]) if "embedding" in reference else 0
    window, invalid = Window(len(positions)), 0
    for line in lines:
        try:
            row = json.loads(line)
            name, confidence, vector = row["class"], float(row["confidence"]), row.get("embedding")
            if since and datetime.fromisoformat(row["time"]).astimezone(UTC) < since:
                continue
            finite = vector is None or np.isfinite(np.asarray(vector, np.float64)).all()
            if not finite or not 0 <= confidence <= 1.001:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            invalid += 1
            continue
        if name not in positions or (vector is not None and len(vector) != width):
            unknown = f"the class {name}" if name not in positions else f"embeddings of {len(vector)} numbers"
            raise DataError(
                f"has {unknown}, unlike the reference", key="log", value=address, fix="give the reference of its model"
            )
        window.add(positions[name], confidence, vector)
    if not window.n:
        period = f" since {since:%Y-%m-%d %H:%M} UTC" if since else ""
        raise DataError(f"has no predictions{period}", key="log", value=address, fix="give another log, or more hours")
    return window, invalid


def format_measures(measured: Sequence[Measure], invalid: int) -> list[str]:
    """Format the measures for a terminal, one line each."""
    lines = [
        f"  {m.name:10} {m.level:9} {m.value:.4f}  (moderate from {m.moderate:.4f}, shifted from {m.shifted:.4f}; "
        f"{m.n:,} predictions)  {DESCRIPTIONS[m.name]}"
        for m in measured
    ]
    if "embedding" not in {m.name for m in measured}:
        lines.append("  embedding  not measured: the log has no embeddings")
    if invalid:
        lines.append(f"  {invalid:,} invalid lines of the log were skipped")
    return lines
