"""Network faults: no wrong byte, the right end, and a clear error if the storage does not respond."""

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.errors import raises
from tests.storage.emulator import Emulator
from tests.storage.faulty import EVENLY, KINDS, FaultyProxy, faults
from tests.storage.s3_server import S3Server
from tests.waiting import PATIENCE
from trainer.errors import DataError, Interrupted
from trainer.storage import retries
from trainer.storage.base import Version, request_deadline
from trainer.storage.path import ConflictError, StoragePath


@pytest.fixture
def proxy(emulator: Emulator | S3Server) -> Iterator[FaultyProxy]:
    with faults(emulator.url, seed=7, scheme=emulator.scheme) as proxy, emulator.environment(proxy.url):
        yield proxy


@pytest.fixture
def one_request(proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline of a request passes while the proxy has it; otherwise the last one could end with its timeout."""
    clock = SimpleNamespace(monotonic=lambda: 1e6 * proxy.counts.total(), sleep=time.sleep)
    monkeypatch.setattr(retries, "time", clock)


google = pytest.mark.parametrize("emulator", ["gs"], indirect=True)


def one_worker(home: StoragePath, scratch: Path, seed: int, operations: int) -> None:
    """Random operations in one folder, each compared with a dictionary."""
    noise = np.random.default_rng([seed])
    held: dict[str, bytes] = {}
    versions: dict[str, Version] = {}
    for _ in range(operations):
        name = f"file-{noise.integers(6)}"
        file, content = home / name, noise.bytes(int(noise.choice([0, 10, 5_000, 300_000])))
        match int(noise.integers(8)):
            case 0:
                held[name], versions[name] = content, file.write(content)
            case 1:
                content = content[:5_000]
                held[name], versions[name] = content, file.write(content, only_if=versions.get(name))
            case 2:
                with pytest.raises(ConflictError):
                    file.write("wrong", only_if='"0"' if str(home).startswith("s3:") else 12345)
            case 3:
                (scratch / "up").write_bytes(content)
                held[name], versions[name] = content, file.upload(scratch / "up")
            case 4 if name in held:
                assert file.fetch() == (held[name], versions[name])
            case 5 if name in held:
                assert file.download(scratch / "down").version == versions[name]
                assert (scratch / "down").read_bytes() == held[name]
            case 6 if name in held:
                start = int(noise.integers(len(held[name]) + 1))
                assert file.read_range(start, 1_000) == held[name][start : start + 1_000]
            case _:
                file.delete()
                held.pop(name, None), versions.pop(name, None)
        assert file.version() == versions.get(name)
    assert {info.path.name: info.version for info in home.list()} == versions
    for name, content in held.items():
        assert (home / name).read() == content


@pytest.mark.usefixtures("small_parts")
def test_hundreds_of_operations_with_one_fault_in_five(
    proxy: FaultyProxy, in_bucket: StoragePath, tmp_path: Path
) -> None:
    def work(seed: int) -> None:
        (tmp_path / str(seed)).mkdir()
        one_worker(in_bucket / str(seed), tmp_path / str(seed), seed, operations=120)

    # Which request gets which fault depends on the order of the threads: more rounds until each kind has occurred.
    with ThreadPoolExecutor(3) as pool:
        for start in range(0, 30, 3):
            list(pool.map(work, range(start, start + 3)))
            if all(proxy.counts[kind] for kind in KINDS):
                break
    assert all(proxy.counts[kind] for kind in KINDS), proxy.counts
    requests = proxy.counts.total()
    faults = requests - proxy.counts["passed"]
    assert abs(faults - 0.2 * requests) < 5 * (0.16 * requests) ** 0.5  # five standard deviations
    in_bucket.delete_tree()
    assert not in_bucket.is_folder()  # including parts of uploads


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("small_parts")
def test_each_kind_alone(proxy: FaultyProxy, in_bucket: StoragePath, tmp_path: Path, kind: str) -> None:
    """Half of all responses have one fault: checksums detect corruption, and a lost response is no conflict."""
    proxy.odds = {kind: 0.5 if kind not in ("corrupted", "corrupted_upload") else 0.3}
    version = None
    for number in range(8):
        version = (in_bucket / "marker").write(f"{number}" * 50, only_if=version)
        assert (in_bucket / "marker").fetch() == (f"{number}".encode() * 50, version)
    content = os.urandom(200_000)
    (in_bucket / "large").write(content)
    (in_bucket / "large").download(tmp_path / "large")
    assert (tmp_path / "large").read_bytes() == content
    assert proxy.counts[kind] > 0


@google
def test_damaged_uploads_that_a_server_stored_are_repeated(proxy: FaultyProxy, in_bucket: StoragePath) -> None:
    proxy.verifies_uploads, proxy.odds = False, {"corrupted_upload": 0.3, "lost": 0.2}
    version = None
    for number in range(20):
        version = (in_bucket / "marker").write(f"{number}" * 50, only_if=version)
        assert (in_bucket / "marker").fetch() == (f"{number}".encode() * 50, version)
    assert proxy.counts["corrupted_upload"] > 2


@google
@pytest.mark.usefixtures("one_request")
def test_a_response_without_a_checksum_is_not_called_corrupt_content(
    proxy: FaultyProxy, in_bucket: StoragePath
) -> None:
    proxy.odds = {}
    (in_bucket / "file").write("x")
    proxy.dropped_headers = {"x-goog-hash"}
    with raises(Interrupted, problem=r"file: no request .*\(corrupt response: the response has no CRC32C\)"):
        (in_bucket / "file").read()


@google
@pytest.mark.parametrize("request_path", ["/compose", "/rewriteTo/"])
@pytest.mark.usefixtures("small_parts")
def test_a_rejected_composition_names_all_permissions(
    proxy: FaultyProxy, in_bucket: StoragePath, request_path: str
) -> None:
    proxy.odds, proxy.refused = {}, request_path
    permissions = r"storage.objects.create and storage.objects.get \(storage.objects.delete as well, to replace\)"
    with raises(DataError, problem=rf"lacks the permission {permissions} \(403: ", fix="grant it"):
        (in_bucket / "file").write(os.urandom(200_000))
    assert not in_bucket.is_folder()


def test_a_lost_response_does_not_hide_a_real_conflict(proxy: FaultyProxy, in_bucket: StoragePath) -> None:
    proxy.odds = {}
    theirs = (in_bucket / "marker").write("same", only_if=None)
    proxy.odds = {"lost": 0.5}
    for _ in range(10):
        with pytest.raises(ConflictError):
            (in_bucket / "marker").write("same", only_if=None)
    assert (in_bucket / "marker").version() == theirs


@google
def test_retry_after_is_respected(proxy: FaultyProxy, in_bucket: StoragePath) -> None:
    proxy.odds, proxy.faults_left, proxy.retry_after = {"limited": 1.0}, 1, "1"
    began = time.monotonic()
    (in_bucket / "file").write("x")
    assert time.monotonic() - began > 1.0


def test_a_read_timeout_ends_a_request(
    proxy: FaultyProxy, in_bucket: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.odds = {}
    (in_bucket / "file").write("x" * 1000)
    monkeypatch.setattr(retries, "READ_SECONDS", 0.3)
    proxy.odds, proxy.faults_left, proxy.slow_seconds = {"slow": 1.0}, 1, 900.0  # longer than pytest lets a test run
    assert (in_bucket / "file").read() == b"x" * 1000
    assert proxy.counts["slow"] == 1


@pytest.mark.usefixtures("small_parts")
def test_a_file_that_always_arrives_damaged_is_not_stored(
    proxy: FaultyProxy, in_bucket: StoragePath, tmp_path: Path
) -> None:
    proxy.odds = {}
    (in_bucket / "file").write(os.urandom(200_000))
    proxy.odds, proxy.instead = {"corrupted": 1.0}, "passed"
    with raises(Interrupted, problem="failed its CRC32C check 5 times", fix="start the same command again"):
        (in_bucket / "file").download(tmp_path / "new" / "file")
    assert os.listdir(tmp_path / "new") == []


def test_a_server_that_restarts(
    emulator: Emulator | S3Server, in_bucket: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts after three retries."""
    pauses = threading.Semaphore(0)

    def choose_pause(_low: float, high: float) -> float:
        pauses.release()
        return high

    def start_later() -> None:
        for _ in range(3):
            pauses.acquire(timeout=PATIENCE)
        emulator.start()

    versions = [(in_bucket / "marker").write("0", only_if=None)]
    monkeypatch.setattr(retries, "DEADLINE_SECONDS", PATIENCE)
    monkeypatch.setattr(retries, "_jitter", SimpleNamespace(uniform=choose_pause))
    emulator.stop()
    starting = threading.Thread(target=start_later)
    starting.start()
    versions.append((in_bucket / "marker").write("1", only_if=versions[0]))
    assert (in_bucket / "marker").fetch() == (b"1", versions[1])
    starting.join()


def test_a_server_that_does_not_respond(
    emulator: Emulator | S3Server, in_bucket: StoragePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = in_bucket / "x"
    version = file.write("saved")
    monkeypatch.setattr(retries, "DEADLINE_SECONDS", 0.6)
    for name in ("INITIAL_BACKOFF_SECONDS", "MAX_BACKOFF_SECONDS"):  # a pause is cut at the deadline
        monkeypatch.setattr(retries, name, 1e6)
    emulator.stop()
    try:
        (tmp_path / "source").write_bytes(b"x" * 20)
        acts: list[Callable[[StoragePath], object]] = [lambda f: f.read(), lambda f: f.list(), lambda f: f.delete()]
        acts += [lambda f: f.write("y"), lambda f: f.upload(tmp_path / "source")]
        for act in acts:
            problem = rf"^{re.escape(str(file))}: no request succeeded within 0.6 s \(connection refused\)$"
            with raises(Interrupted, problem=problem, fix="start the same command again"):
                act(file)
    finally:
        emulator.start()
    monkeypatch.setattr(retries, "DEADLINE_SECONDS", PATIENCE)
    monkeypatch.setattr(retries, "MAX_BACKOFF_SECONDS", 0.05)
    monkeypatch.setattr(retries, "INITIAL_BACKOFF_SECONDS", 0.01)
    assert file.fetch() == (b"saved", version)


@pytest.mark.usefixtures("one_request")
def test_a_busy_server_is_named_by_its_code(proxy: FaultyProxy, in_bucket: StoragePath) -> None:
    proxy.odds = {"unavailable": 1.0}
    with raises(Interrupted, problem=r"no request succeeded within 15 s \(503 Service Unavailable\)"):
        in_bucket.list()


def test_another_deadline_in_a_block(proxy: FaultyProxy, in_bucket: StoragePath) -> None:
    proxy.odds = {"unavailable": 1.0}
    with request_deadline(0.2), raises(Interrupted, problem=r"no request succeeded within 0\.2 s"):
        in_bucket.delete()
    proxy.odds = dict(EVENLY)
    in_bucket.delete()
