"""Measure the drift of a model's inputs and predictions from a reference distribution, without TensorFlow.

The reference, `export/reference.json`, describes the predictions for the test split, or for the validation split if
there is no test split. The thresholds of the three measures are raised for small windows of predictions, so that
without drift a measure exceeds them in at most about 1 of 100 windows:

- `classes`: the population stability index (PSI; Siddiqi 2006, "Credit Risk Scorecards") of the predicted classes;
- `confidence`: the PSI of the largest probability;
- `embedding`: the Frechet distance between Gaussians fitted to the embeddings (Dowson and Landau 1982; as in the
  Frechet inception distance of Heusel et al. 2017), as a fraction of the total variance of the reference.

In shapes, C is the width of an embedding, and C' the width after the projection in reference.json (C if it has none).
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
EMBEDDING_MODERATE, EMBEDDING_SHIFTED = 0.05, 0.1  # fractions of the reference's total variance
DRIFT_FREE_QUANTILE = 0.99  # a threshold below this quantile of a measure without drift is raised to the quantile
BOOTSTRAP_SAMPLES = 200  # pairs of samples that are drawn to estimate this quantile of the embedding distance
CONFIDENCE_BINS = 20  # bins of equal width for the largest probability, over 0..1
MIN_BIN_FRACTION = 0.05  # a bin with a smaller fraction of the reference's predictions is merged with its neighbors

DESCRIPTIONS = {
    "classes": "population stability index of the predicted classes",
    "confidence": "population stability index of the largest probability",
    "embedding": "Frechet distance of the embeddings, as a fraction of the reference's variance",
}

Level = Literal["stable", "moderate", "shifted"]


@dataclass(frozen=True)
class DriftMeasure:
    """The value of one measure of drift, and its thresholds."""

    name: str  # classes | confidence | embedding
    value: float  # at least 0; larger for more drift
    moderate: float  # lowest value of the level "moderate"
    shifted: float  # lowest value of the level "shifted"
    n: int  # number of predictions that were measured

    @property
    def level(self) -> Level:
        """The most severe level whose threshold the value reaches."""
        return "shifted" if self.value >= self.shifted else "moderate" if self.value >= self.moderate else "stable"


class PredictionWindow:
    """Counts and moments of the latest `size` predictions, or of all predictions if `size` is None. Not thread-safe."""

    def __init__(self, class_count: int, size: int | None = None) -> None:
        self.size = size
        self.classes = np.zeros(class_count, np.int64)  # predictions per class
        self.confidences = np.zeros(CONFIDENCE_BINS, np.int64)  # histogram of the largest probability
        self.embedding_count = 0  # predictions with an embedding
        self._sum: Any = 0.0  # sum of the embeddings; float64 [C'] after the first one
        self._outer: Any = 0.0  # sum of their outer products; float64 [C', C'] after the first one
        # (class index, confidence bin, embedding) of each prediction, oldest first; empty if `size` is None.
        self._recent: deque[tuple[int, int, np.ndarray | None]] = deque()

    @property
    def n(self) -> int:
        """The number of predictions in the window."""
        return int(self.classes.sum())

    def add(self, predicted: int, confidence: float, embedding: Sequence[float] | np.ndarray | None = None) -> None:
        """Add a prediction, and drop the oldest one if there are more than `size`.

        Args:
            predicted: index of the predicted class.
            confidence: probability of this class, 0 to 1.
            embedding: projected embedding, float [C']; None if the model does not return embeddings.
        """
        vector = None if embedding is None else np.asarray(embedding, np.float64)
        bin_index = min(max(int(confidence * CONFIDENCE_BINS), 0), CONFIDENCE_BINS - 1)
        self._update(predicted, bin_index, vector, 1)
        if self.size is not None:
            self._recent.append((predicted, bin_index, vector))
            if len(self._recent) > self.size:
                self._update(*self._recent.popleft(), -1)

    def _update(self, predicted: int, bin_index: int, vector: np.ndarray | None, sign: int) -> None:
        """Add a prediction to the counts and moments (`sign` 1), or subtract it (`sign` -1)."""
        self.classes[predicted] += sign
        self.confidences[bin_index] += sign
        if vector is not None:
            self.embedding_count += sign
            self._sum = self._sum + sign * vector
            self._outer = self._outer + sign * np.outer(vector, vector)

    def fit_gaussian(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean, float64 [C'], and covariance, float64 [C', C'], of the embeddings (at least two)."""
        mean = self._sum / self.embedding_count
        return mean, (self._outer - self.embedding_count * np.outer(mean, mean)) / (self.embedding_count - 1)


def compute_psi(reference_counts: Sequence[float] | np.ndarray, counts: Sequence[float] | np.ndarray) -> float:
    """Return the PSI of two histograms [bins]: the sum of (q - p) ln(q / p) over their frequencies p and q.

    It is 0 for equal frequencies. Half a count is added to every bin, so that it is finite if a bin is empty.
    """
    smoothed = [np.asarray(c, np.float64) + 0.5 for c in (reference_counts, counts)]
    p, q = (bins / bins.sum() for bins in smoothed)
    return float(((q - p) * np.log(q / p)).sum())


def compute_psi_quantile(reference_n: int, n: int, bins: int) -> float:
    """Return the 0.99 quantile of the PSI without drift, that is, for two samples of the same distribution.

    The PSI is asymptotically distributed as (1 / reference_n + 1 / n) times chi-squared with bins - 1 degrees of
    freedom (Yurdakul and Naranjo 2020, "Statistical properties of the population stability index"). `reference_n` and
    `n` are the sample sizes, and `bins` is the number of bins.
    """
    from scipy.special import chdtri  # imported here, since the server imports this module but needs no quantiles

    return float((1 / max(reference_n, 1) + 1 / max(n, 1)) * chdtri(max(bins - 1, 1), 1 - DRIFT_FREE_QUANTILE))


def merge_bins(reference: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge neighboring bins of two histograms [bins] so that each has at least 5 % of the reference's total count.

    Return both histograms with the same merged bins.
    """
    minimum = MIN_BIN_FRACTION * reference.sum()
    edges = [0]
    for edge in range(1, len(reference) + 1):
        if min(reference[edges[-1] : edge].sum(), reference[edge:].sum()) >= minimum:
            edges.append(edge)
    return np.add.reduceat(reference, edges), np.add.reduceat(counts, edges)


def compute_embedding_distance(
    reference: Mapping[str, Any], mean: Sequence[float] | np.ndarray, covariance: Sequence[Any] | np.ndarray
) -> float:
    """Return the squared Frechet distance between two Gaussians, divided by the trace of the reference's covariance.

    The result is (|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))) / tr(S1). It is 0 for equal Gaussians. For equal
    covariances it is 1 if the squared distance between the means equals the reference's total variance, tr(S1).
    `reference` is the value of `embedding` in reference.json. Means have shape [C'], covariances [C', C'].
    """
    m1, s1 = np.asarray(reference["mean"], np.float64), np.asarray(reference["covariance"], np.float64)
    m2, s2 = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    root = _square_root(s1)
    # tr((S1 S2)^(1/2)) = tr((S1^(1/2) S2 S1^(1/2))^(1/2)); the second matrix is symmetric
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ s2 @ root), 0.0)).sum()
    distance = ((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * cross
    return float(max(distance, 0.0) / max(np.trace(s1), 1e-12))


def _square_root(covariance: np.ndarray) -> np.ndarray:
    """Return the symmetric square root of a covariance [k, k]. Negative eigenvalues, from rounding, count as 0."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def estimate_embedding_distance_quantile(
    reference: Mapping[str, Any], reference_n: int, n: int, seed: int = 0
) -> float:
    """Estimate the 0.99 quantile of `compute_embedding_distance` without drift, by a parametric bootstrap.

    Pairs of samples, of `reference_n` and `n` embeddings, are drawn from the Gaussian in `reference`, the value of
    `embedding` in reference.json (Efron and Tibshirani 1993, chapter 6).
    """
    mean, covariance = np.asarray(reference["mean"], np.float64), np.asarray(reference["covariance"], np.float64)
    root = _square_root(covariance)
    generator = np.random.default_rng(seed)
    width = len(mean)

    def sample_moments(count: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw the mean and covariance of a sample."""
        count = max(count, 2)
        if count <= width:
            sample = generator.standard_normal((count, width)) @ root
            return mean + sample.mean(0), np.cov(sample, rowvar=False).reshape(width, width)
        # The covariance has a Wishart distribution. Bartlett 1933: draw it directly, which requires count > width.
        factor = np.tril(generator.standard_normal((width, width)), -1)
        factor += np.diag(np.sqrt(generator.chisquare(count - 1 - np.arange(width))))
        scaled = root @ factor
        return mean + root @ generator.standard_normal(width) / np.sqrt(count), scaled @ scaled.T / (count - 1)

    distances = []
    for _ in range(BOOTSTRAP_SAMPLES):
        resampled = dict(zip(("mean", "covariance"), sample_moments(reference_n), strict=True))
        distances.append(compute_embedding_distance(resampled, *sample_moments(n)))
    return float(np.quantile(distances, DRIFT_FREE_QUANTILE))


def measure_drift(reference: Mapping[str, Any], window: PredictionWindow) -> list[DriftMeasure]:
    """Measure how far a window of predictions has drifted from `reference`, the content of reference.json.

    Return the measures `classes`, `confidence` and `embedding`. The last one is left out unless the reference has
    embeddings and the window has at least two.
    """
    reference_n = int(reference["n"])
    classes = np.asarray(reference["class_frequencies"], np.float64) * reference_n, window.classes
    confidences = merge_bins(np.asarray(reference["confidence_histogram"]["counts"], np.float64), window.confidences)
    measures = []
    for name, (expected, counts) in {"classes": classes, "confidence": confidences}.items():
        floor, value = (
            compute_psi_quantile(reference_n, window.n, len(counts)),
            compute_psi(expected, counts),
        )
        measures.append(DriftMeasure(name, value, max(PSI_MODERATE, floor), max(PSI_SHIFTED, floor), window.n))
    if "embedding" in reference and window.embedding_count > 1:
        moments = reference["embedding"]
        floor = estimate_embedding_distance_quantile(
            moments, int(moments.get("n", reference_n)), window.embedding_count
        )
        moderate, shifted = max(EMBEDDING_MODERATE, floor), max(EMBEDDING_SHIFTED, floor)
        value = compute_embedding_distance(moments, *window.fit_gaussian())
        measures.append(DriftMeasure("embedding", value, moderate, shifted, window.embedding_count))
    return measures


def get_most_severe_level(measures: Sequence[DriftMeasure]) -> Level:
    """Return the most severe level of one or more measures."""
    return max((measure.level for measure in measures), key=("stable", "moderate", "shifted").index)


def parse_reference(content: bytes, classes: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Parse reference.json. Return None if it is corrupt or does not have as many classes as `classes`.

    `classes` are the model's class names. They default to the class names in the file, which is invalid without them.
    """
    try:
        reference: dict[str, Any] = json.loads(content)
        num_classes_and_bins = len(reference["class_frequencies"]), len(reference["confidence_histogram"]["counts"])
        expected_names = reference["classes"] if classes is None else classes
        stored_names = reference.get("classes", list(expected_names))
        is_valid = isinstance(stored_names, list) and all(isinstance(name, str) for name in stored_names)
        is_valid &= len(stored_names) == len(expected_names)
        is_valid &= num_classes_and_bins == (len(expected_names), CONFIDENCE_BINS) and reference["n"] > 0
        histograms = (reference["class_frequencies"], reference["confidence_histogram"]["counts"])
        is_valid &= all(0 < np.sum(values) < np.inf and np.min(values) >= 0 for values in histograms)
        is_valid &= "embedding" not in reference or _is_gaussian(reference["embedding"])
        require_nonnegative(reference.get("embedding", {}).get("n", 1))
    except CONTENT_ERRORS:
        return None
    return reference if is_valid else None


def _is_gaussian(embedding: Mapping[str, Any]) -> bool:
    """Return whether `mean` [C'], `covariance` [C', C'] and, if present, `projection` [C, C'] are valid and finite."""
    mean, covariance = np.asarray(embedding["mean"], np.float64), np.asarray(embedding["covariance"], np.float64)
    stored_projection = embedding.get("projection")
    projection = np.asarray([mean] if stored_projection is None else stored_projection, np.float64)
    shapes_match = mean.ndim == 1 and covariance.shape == 2 * mean.shape and projection.shape[1:] == mean.shape
    return shapes_match and all(np.isfinite(values).all() for values in (mean, covariance, projection))


def read_reference(address: str) -> dict[str, Any]:
    """Read a model's reference.json.

    Args:
        address: a .json file, an output_dir, its `export` folder, a SavedModel, or a folder of numbered SavedModels, of
            which the newest one is used; local or in a bucket.

    Raises:
        DataError: the file does not exist or is corrupt.
        Interrupted: the bucket does not respond.
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
    """Return the newest version's folder in a folder of numbered SavedModels; None if `address` has no versions."""
    versions = [] if address.endswith(".json") else list_versions(storage_path(address))
    return versions[0].path.parent if versions else None


@dataclass(frozen=True)
class LogPeriod:
    """Selects predictions of a log by their time and model version. None sets no limit."""

    since: datetime | None = None  # inclusive
    until: datetime | None = None  # exclusive
    version: str | None = None  # name of the version's folder, such as "3"

    def includes(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row of the log is selected. A row without `model_version` matches every version.

        Raise one of `CONTENT_ERRORS` if the time is limited and the row has no valid `time`.
        """
        if self.version is not None and row.get("model_version", self.version) != self.version:
            return False
        if self.since is None and self.until is None:
            return True
        time = datetime.fromisoformat(row["time"]).astimezone(UTC)
        return (self.since is None or time >= self.since) and (self.until is None or time < self.until)

    def __str__(self) -> str:
        """Format the limits for the end of a message, such as " of version 3 since 2026-01-31 02:00 UTC"."""
        parts = [f" of version {self.version}"] if self.version else []
        parts += [f" since {self.since:%Y-%m-%d %H:%M} UTC"] if self.since else []
        return "".join(parts + ([f" until {self.until:%Y-%m-%d %H:%M} UTC"] if self.until else []))


def list_log(address: str, period: LogPeriod) -> list[StoragePath]:
    """List a log's files that can have predictions in a period, sorted by address.

    A log is a file, or a folder that has *.jsonl files itself and in folders named after days, such as `2026-01-31`.
    `trainer.serve` writes a file to the folder of the day, in UTC, of the file's first prediction. The last prediction
    can be from the next day, so the day before the period is included.
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


def read_log(address: str, reference: Mapping[str, Any], period: LogPeriod) -> tuple[PredictionWindow, int]:
    """Read a log's predictions in a period, from a file or a folder of files (`list_log`), into a window.

    Returns:
        The window, and the number of invalid lines, which are skipped; the server may still be writing the last line.

    Raises:
        DataError: there is no log, or a prediction has a class or an embedding width that `reference` does not have.
        NoPredictions: the log has no predictions in the period.
        Interrupted: the bucket does not respond.
    """
    files = list_log(address, period)
    if not files and (address.endswith(".jsonl") or not storage_path(address).is_folder()):
        raise DataError(
            "is not a file or folder with *.jsonl", key="log", value=address, fix="give the log of a server"
        )
    class_indices = {name: i for i, name in enumerate(reference["classes"])}
    embedding_width = len(reference["embedding"]["mean"]) if "embedding" in reference else 0
    window = PredictionWindow(len(class_indices))
    num_invalid = 0
    for line in (line for file in files for line in file.read().decode("utf-8", "replace").splitlines()):
        try:
            row = json.loads(line)
            if not period.includes(row):
                continue
            name, confidence, embedding = row["class"], float(row["confidence"]), row.get("embedding")
            is_finite = embedding is None or np.isfinite(np.asarray(embedding, np.float64)).all()
            if not is_finite or not 0 <= confidence <= 1.001:  # above 1 by rounding
                raise ValueError
        except CONTENT_ERRORS:
            num_invalid += 1
            continue
        if name not in class_indices or (embedding is not None and len(embedding) != embedding_width):
            mismatch = f"the class {name}" if name not in class_indices else f"embeddings of {len(embedding)} numbers"
            raise DataError(
                f"has {mismatch}, unlike the reference", key="log", value=address, fix="give its model's reference"
            )
        window.add(class_indices[name], confidence, embedding)
    if not window.n:
        fix = "give another log, or more hours"
        raise NoPredictions(f"has no predictions{period}", key="log", value=address, fix=fix)
    return window, num_invalid


def format_measures(measures: Sequence[DriftMeasure], num_invalid: int) -> list[str]:
    """Format one line per measure, and notes if `embedding` was not measured or if invalid lines were skipped.

    `num_invalid` is the number of lines of the log that were skipped.
    """
    lines = [
        f"  {m.name:10} {m.level:9} {m.value:.4f}  (moderate from {m.moderate:.4f}, shifted from {m.shifted:.4f}; "
        f"{m.n:,} predictions)  {DESCRIPTIONS[m.name]}"
        for m in measures
    ]
    if "embedding" not in {m.name for m in measures}:
        lines.append("  embedding  not measured: the log has no embeddings")
    if num_invalid:
        lines.append(f"  {num_invalid:,} invalid lines of the log were skipped")
    return lines
