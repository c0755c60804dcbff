"""Drift of the inputs and predictions of a model from a reference distribution, without TensorFlow.

The reference, `export/reference.json`, describes the predictions for the test split, or for the validation split if
there is no test split. There are three measures. Without drift, each exceeds its thresholds in at most about 1 of 100
windows:

- `classes`: the population stability index (PSI; Siddiqi 2006, "Credit Risk Scorecards") of the predicted classes;
- `confidence`: the PSI of the largest probability;
- `embedding`: the Frechet distance between Gaussians fitted to the embeddings (Dowson and Landau 1982; as in the
  Frechet inception distance of Heusel et al. 2017), as a fraction of the reference's own variance.
"""

import json
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal

import numpy as np

from trainer.errors import DataError, NoPredictions
from trainer.storage.path import StoragePath, storage_path
from trainer.storage.small_files import CONTENT_ERRORS, require_nonnegative
from trainer.storage.versions import list_versions

PSI_MODERATE, PSI_SHIFTED = 0.1, 0.25  # the usual thresholds (Siddiqi 2006)
EMBEDDING_MODERATE, EMBEDDING_SHIFTED = 0.05, 0.1  # fractions of the reference's variance
QUANTILE = 0.99  # no threshold is below this quantile of its measure without drift
BOOTSTRAP_SAMPLES = 200
CONFIDENCE_BINS = 20  # equal bins of the largest probability, over 0..1
MIN_BIN_FRACTION = 0.05  # of the reference; smaller bins are merged

DESCRIPTIONS = {
    "classes": "population stability index of the predicted classes",
    "confidence": "population stability index of the largest probability",
    "embedding": "Frechet distance of the embeddings, as a fraction of the reference's variance",
}

Level = Literal["stable", "moderate", "shifted"]


@dataclass(frozen=True)
class Measure:
    """A measure of drift over `n` predictions; `moderate` and `shifted` are the thresholds of these levels."""

    name: str  # classes | confidence | embedding
    value: float
    moderate: float
    shifted: float
    n: int

    @property
    def level(self) -> Level:
        return "shifted" if self.value >= self.shifted else "moderate" if self.value >= self.moderate else "stable"


class Window:
    """Counts and moments of the last `size` predictions, or of all predictions if `size` is None. Not thread-safe."""

    def __init__(self, class_count: int, size: int | None = None) -> None:
        self.size = size
        self.classes = np.zeros(class_count, np.int64)  # predictions per class
        self.confidences = np.zeros(CONFIDENCE_BINS, np.int64)  # histogram of the largest probability
        self.embedding_count = 0  # predictions with an embedding
        self._sum: Any = 0.0
        self._outer: Any = 0.0
        self._recent: deque[tuple[int, int, np.ndarray | None]] = deque()

    @property
    def n(self) -> int:
        """The number of predictions."""
        return int(self.classes.sum())

    def add(self, predicted: int, confidence: float, embedding: Sequence[float] | np.ndarray | None = None) -> None:
        """Add a prediction: class index, its probability, and the projected embedding [C'], None if there is none."""
        vector = None if embedding is None else np.asarray(embedding, np.float64)
        bin_index = min(max(int(confidence * CONFIDENCE_BINS), 0), CONFIDENCE_BINS - 1)
        self._update(predicted, bin_index, vector, 1)
        if self.size is not None:
            self._recent.append((predicted, bin_index, vector))
            if len(self._recent) > self.size:
                self._update(*self._recent.popleft(), -1)

    def _update(self, predicted: int, bin_index: int, vector: np.ndarray | None, sign: int) -> None:
        self.classes[predicted] += sign
        self.confidences[bin_index] += sign
        if vector is not None:
            self.embedding_count += sign
            self._sum = self._sum + sign * vector
            self._outer = self._outer + sign * np.outer(vector, vector)

    def fit_gaussian(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean [C'] and covariance [C', C'] of the embeddings. At least two are required."""
        mean = self._sum / self.embedding_count
        return mean, (self._outer - self.embedding_count * np.outer(mean, mean)) / (self.embedding_count - 1)


def population_stability_index(
    reference_counts: Sequence[float] | np.ndarray, counts: Sequence[float] | np.ndarray
) -> float:
    """Return PSI = sum of (q - p) ln(q / p) over the frequencies p and q of two histograms [bins].

    It is 0 for equal frequencies. Half a count is added to every bin, so that an empty bin does not make it infinite.
    """
    smoothed = [np.asarray(c, np.float64) + 0.5 for c in (reference_counts, counts)]
    p, q = (bins / bins.sum() for bins in smoothed)
    return float(((q - p) * np.log(q / p)).sum())


def psi_quantile(reference_n: int, n: int, bins: int) -> float:
    """Return the 0.99 quantile of the PSI of two samples, of sizes `reference_n` and `n`, from one distribution.

    The PSI is asymptotically distributed as (1 / reference_n + 1 / n) times chi-squared with bins - 1 degrees of
    freedom (Yurdakul and Naranjo 2020, "Statistical properties of the population stability index").
    """
    from scipy.special import chdtri  # imported here: the server imports this module, but does not need the quantiles

    return float((1 / max(reference_n, 1) + 1 / max(n, 1)) * chdtri(max(bins - 1, 1), 1 - QUANTILE))


def merge_bins(reference: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge neighboring bins of two histograms until each bin has at least 5 % of the reference's counts."""
    minimum, edges = MIN_BIN_FRACTION * reference.sum(), [0]
    for edge in range(1, len(reference) + 1):
        if min(reference[edges[-1] : edge].sum(), reference[edge:].sum()) >= minimum:
            edges.append(edge)
    return np.add.reduceat(reference, edges), np.add.reduceat(counts, edges)


def embedding_distance(
    reference: Mapping[str, Any], mean: Sequence[float] | np.ndarray, covariance: Sequence[Any] | np.ndarray
) -> float:
    """Return the squared Frechet distance of two Gaussians, divided by the trace of the reference's covariance.

    (|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))) / tr(S1) is 0 for equal Gaussians, and 1 for equal covariances if
    the squared distance of the means equals the total variance of the reference. `reference` is `embedding` of
    reference.json, with `mean` [C'] and `covariance` [C', C'].
    """
    m1, s1 = np.asarray(reference["mean"], np.float64), np.asarray(reference["covariance"], np.float64)
    m2, s2 = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    root = _square_root(s1)
    # tr((S1 S2)^(1/2)) = tr((S1^(1/2) S2 S1^(1/2))^(1/2)); the second matrix is symmetric
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ s2 @ root), 0.0)).sum()
    distance = ((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * cross
    return float(max(distance, 0.0) / max(np.trace(s1), 1e-12))


def _square_root(covariance: np.ndarray) -> np.ndarray:
    """Return the symmetric square root; negative eigenvalues, from rounding, count as 0."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def embedding_distance_quantile(reference: Mapping[str, Any], reference_n: int, n: int, seed: int = 0) -> float:
    """Return the 0.99 quantile of the distance between `n` embeddings and the reference without drift.

    Parametric bootstrap (Efron and Tibshirani 1993, chapter 6): mean and covariance of pairs of samples, of sizes
    `reference_n` and `n`, are drawn from the Gaussian of the reference.
    """
    mean, covariance = np.asarray(reference["mean"], np.float64), np.asarray(reference["covariance"], np.float64)
    root, draw, width = _square_root(covariance), np.random.default_rng(seed), len(mean)

    def sample_moments(count: int) -> tuple[np.ndarray, np.ndarray]:
        count = max(count, 2)
        if count <= width:
            sample = draw.standard_normal((count, width)) @ root
            return mean + sample.mean(0), np.cov(sample, rowvar=False).reshape(width, width)
        factor = np.tril(draw.standard_normal((width, width)), -1)  # Bartlett 1933: draws a Wishart matrix directly
        factor += np.diag(np.sqrt(draw.chisquare(count - 1 - np.arange(width))))
        scaled = root @ factor
        return mean + root @ draw.standard_normal(width) / np.sqrt(count), scaled @ scaled.T / (count - 1)

    distances = []
    for _ in range(BOOTSTRAP_SAMPLES):
        resampled = dict(zip(("mean", "covariance"), sample_moments(reference_n), strict=True))
        distances.append(embedding_distance(resampled, *sample_moments(n)))
    return float(np.quantile(distances, QUANTILE))


def measure_drift(reference: Mapping[str, Any], window: Window) -> list[Measure]:
    """Measure the drift of a window of predictions; without at least two embeddings, leave out `embedding`."""
    reference_n = int(reference["n"])
    classes = np.asarray(reference["class_frequencies"], np.float64) * reference_n, window.classes
    confidences = merge_bins(np.asarray(reference["confidence_histogram"]["counts"], np.float64), window.confidences)
    measures = []
    for name, (expected, counts) in {"classes": classes, "confidence": confidences}.items():
        floor, value = psi_quantile(reference_n, window.n, len(counts)), population_stability_index(expected, counts)
        measures.append(Measure(name, value, max(PSI_MODERATE, floor), max(PSI_SHIFTED, floor), window.n))
    if "embedding" in reference and window.embedding_count > 1:
        moments = reference["embedding"]
        floor = embedding_distance_quantile(moments, int(moments.get("n", reference_n)), window.embedding_count)
        moderate, shifted = max(EMBEDDING_MODERATE, floor), max(EMBEDDING_SHIFTED, floor)
        value = embedding_distance(moments, *window.fit_gaussian())
        measures.append(Measure("embedding", value, moderate, shifted, window.embedding_count))
    return measures


def most_severe_level(measures: Sequence[Measure]) -> Level:
    """Return the most severe level of the measures."""
    return max((measure.level for measure in measures), key=("stable", "moderate", "shifted").index)


def parse_reference(content: bytes, classes: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Parse reference.json; return None if it is corrupt or has another number of classes than `classes`."""
    try:
        reference: dict[str, Any] = json.loads(content)
        sizes = len(reference["class_frequencies"]), len(reference["confidence_histogram"]["counts"])
        names = reference["classes"] if classes is None else classes
        own_names = reference.get("classes", list(names))
        valid = isinstance(own_names, list) and all(isinstance(name, str) for name in own_names)
        valid &= len(own_names) == len(names)
        valid &= sizes == (len(names), CONFIDENCE_BINS) and reference["n"] > 0
        histograms = (reference["class_frequencies"], reference["confidence_histogram"]["counts"])
        valid &= all(np.isfinite(np.asarray(values, np.float64)).all() for values in histograms)
        valid &= "embedding" not in reference or _is_gaussian(reference["embedding"])
        require_nonnegative(reference.get("embedding", {}).get("n", 1))
    except CONTENT_ERRORS:
        return None
    return reference if valid else None


def _is_gaussian(embedding: Mapping[str, Any]) -> bool:
    """Return whether there are a finite mean [C'], covariance [C', C'] and, if any, projection [C, C']."""
    mean, covariance = np.asarray(embedding["mean"], np.float64), np.asarray(embedding["covariance"], np.float64)
    matrix = embedding.get("projection")
    projection = np.asarray([mean] if matrix is None else matrix, np.float64)
    shaped = mean.ndim == 1 and covariance.shape == 2 * mean.shape and projection.shape[1:] == mean.shape
    return shaped and all(np.isfinite(values).all() for values in (mean, covariance, projection))


def read_reference(address: str) -> dict[str, Any]:
    """Read reference.json from the address of the file itself, or of a run, its export, a SavedModel or its versions.

    Of a folder of versions, the reference is that of the newest one (`find_version`).

    Raises:
        DataError: the file does not exist or is corrupt.
    """
    version = find_version(address)
    root = version or storage_path(address)
    names = ("export/reference.json", "reference.json", "assets/reference.json", "saved_model/1/assets/reference.json")
    files = [root] if address.endswith(".json") else [root / name for name in names]
    fetched = next((content for file in files if (content := file.fetch())), None)
    if fetched is None:
        raise DataError(
            "has no reference.json", key="reference", value=address, fix="give a run with an export, or the file itself"
        )
    if (reference := parse_reference(fetched[0])) is None:
        raise DataError("its reference.json is corrupt", key="reference", value=address, fix="export the run again")
    return reference


def find_version(address: str) -> StoragePath | None:
    """Return the newest version in a folder of versions; None if the address is something else."""
    versions = [] if address.endswith(".json") else list_versions(storage_path(address))
    return versions[0].path.parent if versions else None


@dataclass(frozen=True)
class Period:
    """The predictions of a log that are read: those of a model version in [since, until); None does not limit them."""

    since: datetime | None = None
    until: datetime | None = None
    version: str | None = None

    def includes(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row of the log is included. Raises one of `CONTENT_ERRORS` if it has no valid time."""
        if self.version is not None and row.get("model_version", self.version) != self.version:
            return False
        if self.since is None and self.until is None:
            return True
        time = datetime.fromisoformat(row["time"]).astimezone(UTC)
        return (self.since is None or time >= self.since) and (self.until is None or time < self.until)

    def __str__(self) -> str:
        texts = [f" of version {self.version}"] if self.version else []
        texts += [f" since {self.since:%Y-%m-%d %H:%M} UTC"] if self.since else []
        return "".join(texts + ([f" until {self.until:%Y-%m-%d %H:%M} UTC"] if self.until else []))


def list_log(address: str, period: Period) -> list[StoragePath]:
    """List the files of a log: the file itself, or those in a folder and in its folders of days.

    `trainer.serve` writes a part into the folder of the day, in UTC, of its first prediction. Its last prediction can
    be of the next day.
    """
    root = storage_path(address)
    if root.exists():
        return [root]
    since, until = (time.date() if time else None for time in (period.since, period.until))
    folders = [root]
    for folder in root.folders():
        with suppress(ValueError):
            day = date.fromisoformat(folder.name)
            if (since is None or day >= since - timedelta(days=1)) and (until is None or day <= until):
                folders.append(folder)
    files = [info.path for folder in folders for info in folder.list(recursive=False)]
    return sorted((file for file in files if file.name.endswith(".jsonl")), key=str)


def read_log(address: str, reference: Mapping[str, Any], period: Period) -> tuple[Window, int]:
    """Read the predictions of a log in a period, from a file or a folder of files (`list_log`), into a window.

    Returns:
        The window, and the number of skipped invalid lines; the server may still be writing the last line.

    Raises:
        DataError: there is no log, or it has predictions of another model.
        NoPredictions: the log has no predictions in the period.
    """
    files = list_log(address, period)
    if not files and (address.endswith(".jsonl") or not storage_path(address).is_folder()):
        raise DataError(
            "is not a file or folder with *.jsonl", key="log", value=address, fix="give the log of a server"
        )
    class_indices = {name: i for i, name in enumerate(reference["classes"])}
    width = len(reference["embedding"]["mean"]) if "embedding" in reference else 0
    window, invalid = Window(len(class_indices)), 0
    for line in (line for file in files for line in file.read().decode("utf-8", "replace").splitlines()):
        try:
            row = json.loads(line)
            if not period.includes(row):
                continue
            name, confidence, vector = row["class"], float(row["confidence"]), row.get("embedding")
            finite = vector is None or np.isfinite(np.asarray(vector, np.float64)).all()
            if not finite or not 0 <= confidence <= 1.001:  # above 1 by rounding
                raise ValueError
        except CONTENT_ERRORS:
            invalid += 1
            continue
        if name not in class_indices or (vector is not None and len(vector) != width):
            mismatch = f"the class {name}" if name not in class_indices else f"embeddings of {len(vector)} numbers"
            raise DataError(
                f"has {mismatch}, unlike the reference", key="log", value=address, fix="give its model's reference"
            )
        window.add(class_indices[name], confidence, vector)
    if not window.n:
        fix = "give another log, or more hours"
        raise NoPredictions(f"has no predictions{period}", key="log", value=address, fix=fix)
    return window, invalid


def format_measures(measures: Sequence[Measure], invalid: int) -> list[str]:
    """Format one line per measure, and one that counts `invalid` log lines if there are any."""
    lines = [
        f"  {m.name:10} {m.level:9} {m.value:.4f}  (moderate from {m.moderate:.4f}, shifted from {m.shifted:.4f}; "
        f"{m.n:,} predictions)  {DESCRIPTIONS[m.name]}"
        for m in measures
    ]
    if "embedding" not in {m.name for m in measures}:
        lines.append("  embedding  not measured: the log has no embeddings")
    if invalid:
        lines.append(f"  {invalid:,} invalid lines of the log were skipped")
    return lines
