"""How far what a model sees and says has moved from a reference: plain numbers, without TensorFlow.

A reference is what `export/reference.json` holds, of a split that the model did not learn from. Three measures, each
with a limit that chance alone does not reach:

- `classes`: the population stability index (PSI; Siddiqi 2006, "Credit Risk Scorecards") of the predicted classes;
- `confidence`: the PSI of the largest probability;
- `embedding`: the Frechet distance between Gaussians fitted to the embeddings (Dowson and Landau 1982; as in the
  Frechet inception distance of Heusel et al. 2017), as a share of the reference's own variance.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import numpy as np

from trainer.errors import DataError
from trainer.storage.path import place

MODERATE, SHIFTED = 0.1, 0.25  # of a PSI, as is usual
NEAR, FAR = 0.05, 0.1  # of an embedding: moderate and shifted, as shares of the reference's variance
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
    """One number and what it means."""

    name: str  # classes | confidence | embedding
    value: float
    moderate: float  # from here on
    shifted: float  # from here on
    n: int  # predictions that it is of

    @property
    def level(self) -> Level:
        """What the number says."""
        return "shifted" if self.value >= self.shifted else "moderate" if self.value >= self.moderate else "stable"


class Window:
    """What predictions were made: all, or the last `size` of them. Not for several threads at once."""

    def __init__(self, class_count: int, size: int | None = None) -> None:
        self.size = size
        self.classes = np.zeros(class_count, np.int64)
        self.confidences = np.zeros(BINS, np.int64)
        self.embedded = 0
        self._sum: Any = 0.0
        self._outer: Any = 0.0
        self._kept: deque[tuple[int, int, np.ndarray | None]] = deque()

    @property
    def n(self) -> int:
        """Predictions in it."""
        return int(self.classes.sum())

    def add(self, chosen: int, confidence: float, embedding: Sequence[float] | np.ndarray | None = None) -> None:
        """One prediction: the class, its probability, and the embedding [C'], projected, where there is one."""
        vector = None if embedding is None else np.asarray(embedding, np.float64)
        bin_ = confidence_bin(confidence)
        self._count(chosen, bin_, vector, 1)
        if self.size is None:
            return
        self._kept.append((chosen, bin_, vector))
        if len(self._kept) > self.size:
            self._count(*self._kept.popleft(), -1)

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
    """Which of the bins a largest probability falls into."""
    return min(max(int(confidence * BINS), 0), BINS - 1)


def population_stability(reference_counts: Sequence[float] | np.ndarray, counts: Sequence[float] | np.ndarray) -> float:
    """PSI = sum of (q - p) ln(q / p) over the shares of two histograms [bins]; 0 where they are the same.

    Half a count is added to every bin, so that an empty one is no infinity.
    """
    shares = [np.asarray(c, np.float64) + 0.5 for c in (reference_counts, counts)]
    p, q = (share / share.sum() for share in shares)
    return float(((q - p) * np.log(q / p)).sum())


def stability_by_chance(reference_n: int, n: int, bins: int) -> float:
    """What the PSI of two samples of one distribution stays below in 99 of 100 cases.

    It is about (1/m + 1/n) chi-squared with bins - 1 degrees of freedom (Yurdakul and Naranjo 2020, "Statistical
    properties of the population stability index"); the quantile is that of Wilson and Hilferty 1931.
    """
    degrees = max(bins - 1, 1)
    spread = 2 / (9 * degrees)
    quantile = degrees * (1 - spread + 2.3263 * spread**0.5) ** 3  # 2.3263: the 0.99 quantile of a normal
    return float((1 / max(reference_n, 1) + 1 / max(n, 1)) * quantile)


def merged(reference: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neighbouring bins counted together until each holds a share of the reference that can be compared."""
    least = LEAST_SHARE * reference.sum()
    edges, held = [0], 0.0
    for edge, count in enumerate(reference, start=1):
        held += count
        if held >= least and reference[edge:].sum() >= least:
            edges.append(edge)
            held = 0.0
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
    """What the distance of `n` embeddings without any drift stays below in 99 of 100 cases.

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

    def once() -> float:
        one, other = gaussian(reference_n), gaussian(n)
        return embedding_distance({"mean": one[0], "covariance": one[1]}, *other)

    return float(np.quantile([once() for _ in range(DRAWS)], CHANCE))


def measures(reference: Mapping[str, Any], window: Window) -> list[Measure]:
    """How far a window of predictions lies from the reference; without embeddings in it, the first two alone."""
    assert window.n > 0, "nothing was predicted"
    count = int(reference["n"])
    expected = np.asarray(reference["class_frequencies"], np.float64) * count
    found = [_stability("classes", expected, window.classes, count, window.n)]
    binned = merged(np.asarray(reference["confidence_histogram"]["counts"], np.float64), window.confidences)
    found.append(_stability("confidence", *binned, count, window.n))
    if "embedding" in reference and window.embedded > 1:
        own = reference["embedding"]
        chance = distance_by_chance(own, int(own.get("n", count)), window.embedded)
        value = embedding_distance(own, *window.gaussian())
        found.append(Measure("embedding", value, max(NEAR, chance), max(FAR, chance), window.embedded))
    return found


def _stability(name: str, reference: np.ndarray, counts: np.ndarray, reference_n: int, n: int) -> Measure:
    chance = stability_by_chance(reference_n, n, len(counts))
    value = population_stability(reference, counts)
    return Measure(name, value, max(MODERATE, chance), max(SHIFTED, chance), n)


def verdict(found: Sequence[Measure]) -> Level:
    """The worst of the levels."""
    levels: tuple[Level, ...] = ("stable", "moderate", "shifted")
    return max((measure.level for measure in found), key=levels.index)


def read_reference(address: str) -> dict[str, Any]:
    """What reference.json holds, of a run, an export, a SavedModel, or the file itself.

    Raises:
        DataError: there is none, or it is damaged.
    """
    home = place(address)
    below = ("export/reference.json", "reference.json", "assets/reference.json", "saved_model/1/assets/reference.json")
    files = [home] if address.endswith(".json") else [home / name for name in below]
    found = next((content for file in files if (content := file.fetch())), None)
    if found is None:
        raise DataError(
            f"reference={address} holds no reference.json; give a run that was exported, or the file itself"
        )
    try:
        reference: dict[str, Any] = json.loads(found[0])
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
    home = place(address)
    files = [home] if home.exists() else []
    if not files:
        files = [e.place for e in home.list(recursive=False) if e.place.name.endswith(".jsonl")]
    if not files:
        raise DataError(f"log={address}: there is no such file, and no folder with *.jsonl")
    for file in sorted(files, key=str):
        yield from file.read().decode("utf-8", "replace").splitlines()


def read_log(address: str, reference: Mapping[str, Any], hours: float | None) -> tuple[Window, int]:
    """The predictions of a log, and how many of its lines say nothing (a server may be writing one).

    Args:
        hours: only those of the last so many; None: all of them.

    Raises:
        DataError: no prediction is there, or they are of another model.
    """
    since = datetime.now(UTC) - timedelta(hours=hours) if hours else None
    places = {name: at for at, name in enumerate(reference["classes"])}
    width = len(reference["embedding"]["mean"]) if "embedding" in reference else 0
    window, strange = Window(len(places)), 0
    for line in lines_of(address):
        try:
            told = json.loads(line)
            name, confidence, vector = told["class"], float(told["confidence"]), told.get("embedding")
            if since and datetime.fromisoformat(told["time"]).astimezone(UTC) < since:
                continue
            if vector is not None and not np.isfinite(np.asarray(vector, np.float64)).all():
                raise ValueError
            if not 0 <= confidence <= 1.001:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            strange += 1
            continue
        if name not in places or (vector is not None and len(vector) != width):
            what = f"the class {name}" if name not in places else f"embeddings of {len(vector)} numbers"
            raise DataError(f"log={address} has {what}, which the reference does not know: it is of another model")
        window.add(places[name], confidence, vector)
    if not window.n:
        raise DataError(f"log={address} holds no prediction" + (f" since {since:%Y-%m-%d %H:%M} UTC" if since else ""))
    return window, strange


def words(found: Sequence[Measure], strange: int) -> list[str]:
    """What was measured, one line each."""
    lines = [
        f"  {m.name:10} {m.level:9} {m.value:.4f}  (moderate from {m.moderate:.4f}, shifted from {m.shifted:.4f}; "
        f"{m.n:,} predictions)  {WHAT[m.name]}"
        for m in found
    ]
    if "embedding" not in {m.name for m in found}:
        lines.append("  embedding  not measured: the log holds no embeddings")
    return [*lines, *([f"  {strange:,} lines of the log could not be read"] if strange else [])]
