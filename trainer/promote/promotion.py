"""Promotion of a run's model to the next version of a served model, and the return to an earlier version."""

import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trainer
from trainer.errors import DataError, Interrupted, NotPromoted
from trainer.evaluation.paired import PairedComparison
from trainer.monitoring.log import format_utc_now, log
from trainer.report.compare import compare_runs, describe_outcome, read_scored_run
from trainer.storage.lease import acquire_lease
from trainer.storage.local import delete_temporary_files, write_json
from trainer.storage.path import StoragePath, canonicalize_address, storage_path
from trainer.storage.small_files import read_json
from trainer.storage.versions import (
    GRAPH,
    MANIFEST,
    checksum_files,
    commit_version,
    delete_incomplete,
    delete_version,
    describe_corruption,
    list_versions,
    parse_manifest,
    parse_version_number,
)

SCORE_FILES = ("report/report.json", "report/predictions.csv")  # a run's files that are copied into its version


@dataclass(frozen=True)
class Decision:
    """Whether a run is promoted, and why."""

    promoted: bool
    reason: str


def decide(pair: PairedComparison, n: int, version: int, allow_worse: bool) -> Decision:
    """Decide whether to promote a run: yes, unless it is significantly worse than the served version.

    Args:
        pair: comparison of the run with the served version; the served version is the reference.
        n: number of held-out examples in the comparison.
        version: number of the served version.
        allow_worse: promote the run even if it is worse.
    """
    outcome = describe_outcome(pair, pair.p)
    low, high = pair.interval
    relation = "from" if outcome == "no significant difference" else "than"
    reason = (
        f"{outcome} {relation} version {version} on {n:,} held-out examples: {pair.difference:+.4f} accuracy (95 % "
        f"interval {low:+.4f} to {high:+.4f}), {pair.won} won and {pair.lost} lost, p = {pair.p:.3g}"
    )
    return Decision(outcome != "worse" or allow_worse, reason)


def choose_previous_version(manifests: Mapping[int, Mapping[str, Any]]) -> int | None:
    """Return the number of the version before the newest one, to which `back=true` returns; None if there is none.

    A copy counts as its origin. For example, if there are versions 1, 2 and 3, the first return copies version 2 to
    version 4, and the second one copies version 1 to version 5.

    Args:
        manifests: manifest of each version, by number; not empty.
    """

    def origin(number: int) -> int:
        return int(manifests[number].get("origin") or number)

    newest = max(manifests)
    earlier = [number for number in manifests if number < origin(newest)]
    return max(earlier, default=None)


@contextmanager
def _hold_lease(folder: StoragePath) -> Iterator[None]:
    """Hold the lease on the versions' folder during this block, and delete incomplete versions at the end.

    If the block raises an error, nothing is deleted.
    """
    holder = f"process {os.getpid()} on {os.environ.get('HOSTNAME') or platform.node()}"
    try:
        lease = acquire_lease(folder, holder, os.environ.get("JOB_UID"), log_message=log.info)
    except Interrupted as error:
        error.key = error.key and "to"  # the argument of this command instead of output_dir
        raise
    with lease:
        yield
        lease.check()
        delete_incomplete(folder)
        if folder.is_local:
            delete_temporary_files(Path(str(folder)), recursive=False)


def read_manifest(version: StoragePath) -> dict[str, Any]:
    """Read a version's manifest. Return {} if the version has none because `trainer.promote` did not write it.

    Raises:
        DataError: the manifest is corrupt.
    """
    return read_json(version / MANIFEST, parse_manifest, "promote a run with allow_worse=true") or {}


def _get_version_number(version: StoragePath) -> int:
    """Return a version's number. Its folder must be named by the number, as in `list_versions`."""
    number = parse_version_number(version)
    assert number is not None, "from `list_versions` or `commit_version`"
    return number


def _download_run(run: str, to: Path) -> None:
    """Copy a finished run's newest SavedModel and its scores to a local folder.

    Raises:
        DataError: the run is not finished, or has no SavedModel or no scores.
    """
    run_folder = storage_path(run)
    if not (run_folder / "DONE").exists():
        fix = "give the output_dir of a finished run"
        raise DataError("is not a finished run", key="run", value=run, fix=fix)
    exports = list_versions(run_folder / "export" / "saved_model")
    if not exports:
        fix = "add saved_model to export.formats, or run trainer.export"
        raise DataError("has no export/saved_model", key="run", value=run, fix=fix)
    _download_version(exports[0].path.parent, to)
    for name in SCORE_FILES:
        if not (run_folder / name).exists():
            raise DataError(f"has no {name}", key="run", value=run, fix="give the output_dir of a finished run")
        (run_folder / name).download(to / name)


def _download_version(version: StoragePath, to: Path) -> None:
    """Copy a version to a local folder, without its manifest."""
    for info in version.list():
        name = str(info.path).removeprefix(f"{version}/")
        if name != MANIFEST:
            info.path.download(to / name)


def promote(run: str, folder: StoragePath, keep: int, allow_worse: bool = False) -> tuple[int, str]:
    """Make a run's model the next version in `folder`.

    If the newest version already has exactly the same files, no version is added.

    Args:
        run: output_dir of a finished run, local or in a bucket.
        folder: folder that contains the versions.
        keep: number of versions to retain; older ones are deleted after the promotion.
        allow_worse: promote the run even if it is worse than the newest version or cannot be compared with it.

    Returns:
        The number of the version with the model, and the reason for the promotion.

    Raises:
        DataError: the run is not finished, lacks a SavedModel or scores, or cannot be compared with the newest version.
        NotPromoted: the run is worse than the newest version, and `allow_worse` is False.
        Interrupted: another process writes to the folder, or the bucket does not respond.
    """
    with tempfile.TemporaryDirectory(prefix="kubetune-promote-") as temporary_path, _hold_lease(folder):
        local_folder = Path(temporary_path)
        _download_run(run, local_folder)
        files = checksum_files(local_folder)
        versions = [info.path.parent for info in list_versions(folder)]
        decision, comparison = Decision(True, "there is no version to compare with"), None
        if versions:
            newest, number = versions[0], _get_version_number(versions[0])
            served_manifest = _read_served_manifest(newest, allow_worse)
            if served_manifest.get("files") == files:
                log.info(f"{run} is version {number} of {folder} already")
                return number, "promoted already"
            decision, comparison = _compare(run, newest, allow_worse)
        if not decision.promoted:
            fix = "nothing was changed; allow_worse=true promotes it all the same"
            raise NotPromoted(f"is {decision.reason}", key="run", value=run, fix=fix)
        manifest = {"run": canonicalize_address(run), "origin": None, "comparison": comparison, "files": files}
        number = _commit(folder, local_folder, manifest, keep)
        log.info(f"{run} is version {number} of {folder}; {decision.reason}")
        return number, decision.reason


def _read_served_manifest(version: StoragePath, allow_worse: bool) -> dict[str, Any]:
    """Read the served version's manifest. If it is corrupt and `allow_worse` is True, return {}."""
    try:
        return read_manifest(version)
    except DataError:
        if allow_worse:
            return {}
        raise


def _compare(run: str, newest: StoragePath, allow_worse: bool) -> tuple[Decision, dict[str, Any] | None]:
    """Compare a run with the newest version on the held-out examples that both have scored.

    Return the decision, and the comparison's statistics for the manifest. They are None if the two cannot be compared,
    which is an error unless `allow_worse` is True.
    """
    number = _get_version_number(newest)
    try:
        result = compare_runs([read_scored_run(str(newest), str(number)), read_scored_run(run, run)])
    except DataError as error:
        if allow_worse:
            return Decision(True, f"not compared with version {number}: {error.problem}"), None
        problem = f"cannot be compared with version {number}: {error.problem}"
        raise DataError(problem, key="run", value=run, fix="promote it with allow_worse=true") from None
    (pair,), n = result.pairs, len(result.files)
    record = {"version": number, "n": n, "difference": pair.difference, "interval": list(pair.interval), "p": pair.p}
    return decide(pair, n, number, allow_worse), record


def restore_previous_version(folder: StoragePath, keep: int) -> int:
    """Copy the version before the newest one to a new version, and return the number of the copy.

    The copy has a new number, because servers choose the version with the highest number. If the newest version were
    deleted instead, the next version would reuse its number. `keep` is the number of versions to retain.

    Raises:
        DataError: there is no earlier version, its files are corrupt, or the manifest of a version is corrupt.
        Interrupted: another process writes to the folder, or the bucket does not respond.
    """
    with tempfile.TemporaryDirectory(prefix="kubetune-promote-") as temporary_path, _hold_lease(folder):
        local_folder = Path(temporary_path)
        versions = {_get_version_number(info.path.parent): info.path.parent for info in list_versions(folder)}
        manifests = {number: read_manifest(version) for number, version in versions.items()}
        source = choose_previous_version(manifests) if manifests else None
        if source is None:
            fix = "promote a run instead"
            raise DataError("has no version before the newest one", key="to", value=str(folder), fix=fix)
        _download_version(versions[source], local_folder)
        manifest = manifests[source] or {"run": None, "comparison": None, "files": checksum_files(local_folder)}
        if reason := describe_corruption(local_folder, manifest):
            raise DataError(f"{versions[source]}: {reason}", key="to", value=str(folder), fix="promote a run instead")
        origin = manifest.get("origin") or source
        number = _commit(folder, local_folder, manifest | {"origin": origin}, keep)
        log.info(f"version {number} of {folder} is a copy of version {origin}, instead of version {max(versions)}")
        return number


def _commit(folder: StoragePath, local_folder: Path, manifest: dict[str, Any], keep: int) -> int:
    """Add a version with its manifest, delete the oldest versions, and return the number of the new version."""
    full_manifest = manifest | {"promoted": format_utc_now(), "kubetune": trainer.__version__}
    write_json(local_folder / MANIFEST, full_manifest)
    assert (local_folder / GRAPH).exists()
    number = _get_version_number(commit_version(folder, local_folder))
    for info in list_versions(folder)[keep:]:
        delete_version(info.path.parent)
        log.info(f"deleted {info.path.parent}, as keep={keep}")
    return number
