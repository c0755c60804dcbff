"""Drift of a model's inputs and answers from a reference: plain numbers, without TensorFlow.

A reference is what `export/reference.json` holds, of a split that the model did not learn from. Three measures, each
with a limit that chance alone does not reach:

- `classes`: the population stability index (PSI; Siddiqi 2006, "Credit Risk Scorecards") of the predicted classes;
- `confidence`: the PSI of the largest probability;
- `embedding`: the Frechet distance between Gaussians fitted to the embeddings (Dowson and Landau 1982; as in the
  Frechet inception distance of Heusel et al. 2017), as a fraction of the reference's own variance.
"""

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import numpy as np

from trainer.errors import DataError
from trainer.storage.path import storage_path

MODERATE, SHIFTED = 0.1, 0.25  # of a PSI, as is usual
NEAR, FAR = 0.05, 0.1  # of an embedding: moderate and shifted, as fractions of the reference's variance
CHANCE = 0.99  # of samples without any drift stay below a limit
DRAWS = 200  # of the bootstrap
BINS = 20  # of the largest probability, over 0..1
LEAST_SHARE = 0.05  # of the reference in a bin; smaller neighbours are counted together

WHAT = {
    "classes": "population stability index of the predicted classes",
    "confidence": "population stability index of the largest probability",
    "embedding": "Frechet distance of the embeddings, as a share of the reference's variance",
}

Level = Literal["stable", "moderate", "shifted"]


@dataclass(frozen=True)
class Measure:
    """A measure of drift, over n predictions, and the limits from which on it is moderate and shifted."""

    name: str  # classes | confidence | embedding
    value: float
    moderate: float
    shifted: float
    n: int

    @property
    def level(self) -> Level:
        return "shifted" if self.value >= self.shifted else "moderate" if self.value >= self.moderate else "stable"


class Window:
    """Counts and moments of predictions: all, or the last `size` of them. Not thread-safe."""

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
        """Add a prediction: the class, its probability, and the embedding [C'], projected, where there is one."""
        vector = None if embedding is None else np.asarray(embedding, np.float64)
        bin_ = confidence_bin(confidence)
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
        """Mean [C'] and covariance [C', C'] of the embeddings, of which there must be 2."""
        assert self.embedded > 1, self.embedded
        mean = self._sum / self.embedded
        return mean, (self._outer - self.embedded * np.outer(mean, mean)) / (self.embedded - 1)


def confidence_bin(confidence: float) -> int:
    """The index of the bin that a largest probability falls into, 0 to 19."""
    return min(max(int(confidence * BINS), 0), BINS - 1)


def population_stability(reference_counts: Sequence[float] | np.ndarray, counts: Sequence[float] | np.ndarray) -> float:
    """PSI = sum of (q - p) ln(q / p) over the frequencies of two histograms [bins]; 0 where they are the same.

    Half a count is added to every bin, so that an empty one is no infinity.
    """
    filled = [np.asarray(c, np.float64) + 0.5 for c in (reference_counts, counts)]
    p, q = (bins / bins.sum() for bins in filled)
    return float(((q - p) * np.log(q / p)).sum())


def stability_by_chance(reference_n: int, n: int, bins: int) -> float:
    """The limit that the PSI of two samples of one distribution stays below in 99 of 100 cases.

    It is about (1/m + 1/n) chi-squared with bins - 1 degrees of freedom (Yurdakul and Naranjo 2020, "Statistical
    properties of the population stability index"); the quantile is that of Wilson and Hilferty 1931.
    """
    degrees = max(bins - 1, 1)
    spread = 2 / (9 * degrees)
    quantile = degrees * (1 - spread + 2.3263 * spread**0.5) ** 3  # 2.3263: the 0.99 quantile of a normal
    return float((1 / max(reference_n, 1) + 1 / max(n, 1)) * quantile)


def merged(reference: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two histograms, neighbouring bins counted together until each holds 5 % of the reference."""
    least, edges = LEAST_SHARE * reference.sum(), [0]
    for edge in range(1, len(reference) + 1):
        if min(reference[edges[-1] : edge].sum(), reference[edge:].sum()) >= least:
            edges.append(edge)
    return np.add.reduceat(reference, edges), np.add.reduceat(counts, edges)


def embedding_distance(
    reference: Mapping[str, Any], mean: Sequence[float] | np.ndarray, covariance: Sequence[Any] | np.ndarray
) -> float:
    """Squared Frechet distance between two Gaussians over the trace of the reference's covariance.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), over tr(S1): 0 where they are the same, 1 where the reference has
    moved by as much as it is wide.

    Args:
        reference: `mean` [C'] and `covariance` [C', C'], as under `embedding` of reference.json.
    """
    m1, s1 = np.asarray(reference["mean"], np.float64), np.asarray(reference["covariance"], np.float64)
    m2, s2 = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    half = _root(s1)
    # tr((S1 S2)^(1/2)) = tr((S1^(1/2) S2 S1^(1/2))^(1/2)), whose matrix is symmetric
    between = np.sqrt(np.maximum(np.linalg.eigvalsh(half @ s2 @ half), 0.0)).sum()
    distance = ((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * between
    return float(max(distance, 0.0) / max(np.trace(s1), 1e-12))


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def distance_by_chance(reference: Mapping[str, Any], reference_n: int, n: int, seed: int = 0) -> float:
    """The limit that the distance of `n` embeddings without any drift stays below in 99 of 100 cases.

    A parametric bootstrap (Efron and Tibshirani 1993, chapter 6): two samples, of `reference_n` and `n`, are drawn
    from the reference's own Gaussian again and again.
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
    return float(np.quantile(distances, CHANCE))


def measures(reference: Mapping[str, Any], window: Window) -> list[Measure]:
    """Measure how far a window of predictions lies from the reference; without embeddings, the first two alone."""
    assert window.n > 0, "nothing was predicted"
    count = int(reference["n"])
    expected = np.asarray(reference["class_frequencies"], np.float64) * count
    binned = merged(np.asarray(reference["confidence_histogram"]["counts"], np.float64), window.confidences)
    measured = []
    for name, (before, now) in {"classes": (expected, window.classes), "confidence": binned}.items():
        chance, value = stability_by_chance(count, window.n, len(now)), population_stability(before, now)
        measured.append(Measure(name, value, max(MODERATE, chance), max(SHIFTED, chance), window.n))
    if "embedding" in reference and window.embedded > 1:
        own = reference["embedding"]
        chance = distance_by_chance(own, int(own.get("n", count)), window.embedded)
        value = embedding_distance(own, *window.gaussian())
        measured.append(Measure("embedding", value, max(NEAR, chance), max(FAR, chance), window.embedded))
    return measured


def verdict(measured: Sequence[Measure]) -> Level:
    """The worst of the levels."""
    return max((measure.level for measure in measured), key=("stable", "moderate", "shifted").index)


def read_reference(address: str) -> dict[str, Any]:
    """Read the reference.json of a run, an export or a SavedModel, or the file itself.

    Raises:
        DataError: there is none, or it is damaged.
    """
    root = storage_path(address)
    below = ("export/reference.json", "reference.json", "assets/reference.json", "saved_model/1/assets/reference.json")
    files = [root] if address.endswith(".json") else [root / name for name in below]
    fetched = next((content for file in files if (content := file.fetch())), None)
    if fetched is None:
        raise DataError(
            f"reference={address} holds no reference.json; give a run that was exported, or the file itself"
        )
    try:
        reference: dict[str, Any] = json.loads(fetched[0])
        assert len(reference["classes"]) == len(reference["class_frequencies"])
        assert len(reference["confidence_histogram"]["counts"]) == BINS
        assert reference["n"] > 0
    except (ValueError, KeyError, TypeError, AssertionError):
        raise DataError(f"reference={address}: its reference.json is damaged; export the run again") from None
    return reference


def lines_of(address: str) -> Iterator[str]:
    """The lines of a log, or of all logs in a folder.

    Raises:
        DataError: there is none.
    """
    root = storage_path(address)
    files = [root] if root.exists() else [e.path for e in root.list(recursive=False) if e.path.name.endswith(".jsonl")]
    if not files:
        raise DataError(f"log={address}: there is no such file, and no folder with *.jsonl")
    for file in sorted(files, key=str):
        yield from file.read().decode("utf-8", "replace").splitlines()


def read_log(address: str, reference: Mapping[str, Any], hours: float | None) -> tuple[Window, int]:
    """The predictions of a log, and the count of its lines that are invalid (a server may be writing one).

    Args:
        hours: only the predictions of the last `hours`; None: all of them.

    Raises:
        DataError: no prediction is there, or they are of another model.
    """
    since = datetime.now(UTC) - timedelta(hours=hours) if hours else None
    positions = {name: i for i, name in enumerate(reference["classes"])}
    width = len(reference["embedding"]["mean"]) if "embedding" in reference else 0
    window, invalid = Window(len(positions)), 0
    for line in lines_of(address):
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
            what = f"the class {name}" if name not in positions else f"embeddings of {len(vector)} numbers"
            raise DataError(f"log={address} has {what}, which the reference does not know: it is of another model")
        window.add(positions[name], confidence, vector)
    if not window.n:
        raise DataError(f"log={address} holds no prediction" + (f" since {since:%Y-%m-%d %H:%M} UTC" if since else ""))
    return window, invalid


def words(measured: Sequence[Measure], invalid: int) -> list[str]:
    """The measures for a terminal, one line each."""
    lines = [
        f"  {m.name:10} {m.level:9} {m.value:.4f}  (moderate from {m.moderate:.4f}, shifted from {m.shifted:.4f}; "
        f"{m.n:,} predictions)  {WHAT[m.name]}"
        for m in measured
    ]
    if "embedding" not in {m.name for m in measured}:
        lines.append("  embedding  not measured: the log holds no embeddings")
    if invalid:
        lines.append(f"  {invalid:,} lines of the log could not be read")
    return lines
