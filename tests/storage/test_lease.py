"""The lease: one holder of many, and no commit by a process that lost it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.errors import raises
from tests.storage.conftest import folder_of
from tests.storage.emulator import BUCKET, Emulator, running
from tests.storage.faulty import faults
from tests.storage.s3_server import S3Server
from tests.waiting import PATIENCE, wait_until
from trainer.errors import DataError, Interrupted
from trainer.storage import lease as leases
from trainer.storage import retries
from trainer.storage.base import Version, request_deadline
from trainer.storage.lease import acquire_lease, describe_holder
from trainer.storage.path import StoragePath, storage_path

ROOT = Path(__file__).parents[2]
SECONDS = 1.5
LONG_SECONDS = 900.0  # a lease that does not expire while pytest lets a test run

# Takes the lease, then commits each line of stdin, and prints the results.
HOLDER = """
import sys
from trainer.errors import TrainerError
from trainer.storage import lease as leases
from trainer.storage.path import storage_path
leases.LEASE_SECONDS = float(sys.argv[4])
try:
    lease = leases.acquire_lease(
        storage_path(sys.argv[1]), sys.argv[2], sys.argv[3] or None, max_wait=float(sys.argv[5]), log_message=print
    )
    print("taken", flush=True)
except TrainerError as error:
    print(f"{type(error).__name__}: {error}", flush=True)
    sys.exit(error.exit_code)
for line in sys.stdin:
    try:
        print(f"done {lease.commit('LATEST', line.strip())}", flush=True)
    except TrainerError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
lease.release()
"""


class Holder:
    """Another process that holds or requests the lease of a folder."""

    def __init__(
        self, home: StoragePath, name: str, uid: str = "", max_wait: float = 0.0, seconds: float = SECONDS
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(home), name, uid, str(seconds), str(max_wait)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip

    def receive(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def send(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def commit(self, content: str) -> str:
        self.send(content)
        return self.receive()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream
            stream.close()


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", SECONDS)


@pytest.fixture
def home(request: pytest.FixtureRequest, tmp_path: Path) -> StoragePath:
    """An empty folder in a bucket of Google, and by parametrization on disk or in S3."""
    kind = getattr(request, "param", "gs")
    if kind == "local":
        return storage_path(tmp_path / "home")
    request.getfixturevalue(f"{kind}_server")
    return folder_of(request, kind)


every = pytest.mark.parametrize("home", ["local", "gs", "s3"], indirect=True)
buckets = pytest.mark.parametrize("home", ["gs", "s3"], indirect=True)


@pytest.fixture
def holder(request: pytest.FixtureRequest, home: StoragePath) -> Iterator[Holder]:
    """The holder of the lease, for `SECONDS` or by parametrization longer."""
    process = Holder(home, "host-a/1", "job-1", seconds=getattr(request, "param", SECONDS))
    assert process.receive() == "taken"
    yield process
    process.end()


def refused(problem: str, act: Callable[[], object], fix: str = "") -> None:
    with raises(Interrupted, problem=problem, fix=fix):
        act()


def at_the_same_time(function: Callable[[int], object], count: int) -> None:
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(function, range(count)))


@every
def test_a_lease_is_taken_renewed_and_released(home: StoragePath, monkeypatch: pytest.MonkeyPatch) -> None:
    with acquire_lease(home, "host-a/1") as lease:
        first = (home / ".lease").version()
        wait_until(lambda: (home / ".lease").version() != first)
        lease.check()
        assert (home / "LATEST").version() is None
        version = lease.commit("LATEST", "step-1")
        assert lease.commit("LATEST", "step-2") != version
        assert lease.commit("DONE", "") == (home / "DONE").version()
    assert (home / "LATEST").read() == b"step-2"
    refused(f"^{home}: the lease was released; this process publishes nothing more$", lease.check)
    monkeypatch.setattr(leases, "LEASE_SECONDS", LONG_SECONDS)  # for which it would wait
    acquire_lease(home, "host-b/1").release()


@every
def test_the_holder_of_a_folder(home: StoragePath) -> None:
    assert describe_holder(home, None) is None
    with acquire_lease(home, "host-a/1", "job-1"):
        assert str(describe_holder(home, None)).startswith("host-a/1, last renewed at 20")
        assert str(describe_holder(home, "job-2")).startswith("host-a/1, ")
        assert describe_holder(home, "job-1") is None  # a process of the same Job takes it at once
    assert describe_holder(home, None) is None
    (home / ".lease").write("rubbish")
    with raises(DataError, problem="is not a lease", fix="delete it if no run uses this folder"):
        describe_holder(home, None)


@every
def test_one_of_many_takes_it(home: StoragePath) -> None:
    taken, problems = [], []

    def request(number: int) -> None:
        try:
            taken.append(acquire_lease(home, f"host-{number}"))
        except Interrupted as error:
            problems.append(error.problem)

    at_the_same_time(request, 6)
    (lease,) = taken
    assert problems == [f"is in use by {lease._state.holder}"] * 5
    lease.commit("LATEST", "1")
    lease.release()


def test_another_process_is_rejected_while_the_lease_is_renewed(home: StoragePath, holder: Holder) -> None:
    problem = re.escape("is in use by host-a/1 (uid job-1)")
    with raises(Interrupted, key="output_dir", value=home, problem=f"^{problem}$", fix="start the same command again"):
        acquire_lease(home, "host-b/1", "job-2", note="")
    other = Holder(home, "host-c/1", "job-3")
    assert other.receive().startswith("Interrupted")
    assert other.process.wait(PATIENCE) == 75
    other.end()
    assert holder.commit("step-1").startswith("done")


def test_a_pod_waits_for_the_pod_of_a_deleted_job_that_still_saves(home: StoragePath, holder: Holder) -> None:
    """`kubectl delete` and `apply` in quick succession: the new Job must not fail for good."""
    new = Holder(home, "host-b/1", "job-2", max_wait=900)
    assert new.receive() == (f"output_dir={home} is in use by host-a/1 (uid job-1); waiting up to 900 s until it ends")
    assert holder.commit("step-1").startswith("done")
    assert holder.process.stdin
    holder.process.stdin.close()  # it ends, and releases the lease
    assert holder.process.wait(PATIENCE) == 0
    assert new.receive() == "taken"
    assert new.commit("step-2").startswith("done")
    new.end()


def test_a_holder_that_is_killed_while_it_is_waited_for_loses_the_lease(home: StoragePath, holder: Holder) -> None:
    new = Holder(home, "host-b/1", "job-2", max_wait=900)
    assert "is in use by" in new.receive()
    os.kill(holder.process.pid, signal.SIGKILL)
    assert new.receive() == "taken"  # long before its patience has ended
    new.end()


def test_a_process_waits_only_as_a_pod() -> None:
    assert leases.choose_max_wait(None) == 0
    assert leases.choose_max_wait("4f1c3a52") >= leases.GRACE_SECONDS + leases.LEASE_SECONDS


@pytest.mark.parametrize("holder", [LONG_SECONDS], indirect=True)
def test_the_same_job_takes_over_at_once(home: StoragePath, holder: Holder) -> None:
    assert holder.commit("step-1").startswith("done")
    with acquire_lease(home, "host-b/1", "job-1") as lease:
        lease.commit("LATEST", "step-2")
        lost = f"Interrupted: {home}: the lease was taken over by host-b/1 (uid job-1)"
        assert holder.commit("step-1 again").startswith(lost)
        lease.check()
        assert (home / "LATEST").read() == b"step-2"


def test_the_lease_of_a_dead_holder_expires(home: StoragePath, holder: Holder) -> None:
    os.kill(holder.process.pid, signal.SIGKILL)
    began = time.monotonic()
    with acquire_lease(home, "host-b/1", "job-2"):
        assert time.monotonic() - began > SECONDS


@every
def test_a_frozen_holder_that_resumes_cannot_commit(home: StoragePath, holder: Holder) -> None:
    assert holder.commit("step-1").startswith("done")
    os.kill(holder.process.pid, signal.SIGSTOP)
    holder.send("step-2 of the frozen")
    with acquire_lease(home, "host-b/1", "job-2") as lease:
        lease.commit("LATEST", "step-2")
        os.kill(holder.process.pid, signal.SIGCONT)
        assert holder.receive().startswith(f"Interrupted: {home}: ")
        assert (home / "LATEST").read() == b"step-2"
        result = ""
        while "the lease was taken over by host-b/1 (uid job-2)" not in result:  # until its renewal fails
            result = holder.commit("step-3 of the resumed")
            assert result.startswith(f"Interrupted: {home}: ")
        lease.commit("LATEST", "step-3")
    assert (home / "LATEST").read() == b"step-3"


@every
@pytest.mark.parametrize("before", [None, "step-1"])
def test_frozen_between_the_check_and_the_commit(home: StoragePath, before: str | None) -> None:
    """No clock is involved: a holder that has just checked cannot commit after a takeover."""
    old = acquire_lease(home, "host-a/1", "job-1")
    if before:
        old.commit("LATEST", before)
    old.check()  # here it freezes
    new = acquire_lease(home, "host-b/1", "job-1")
    refused("taken over by host-b/1", lambda: old._write(leases._Commit("LATEST", "late", None)))
    assert ((home / "LATEST").fetch() or (None,))[0] == (before.encode() if before else None)
    new.release()
    old.release()


@every
@pytest.mark.parametrize("before", [None, "step-1"])
def test_frozen_between_the_two_writes_of_a_commit(home: StoragePath, before: str | None) -> None:
    """A commit in the lease is published exactly once, if necessary by the next holder."""
    old = acquire_lease(home, "host-a/1", "job-1")
    if before:
        old.commit("LATEST", before)
    version = (home / "LATEST").version()
    old._write(leases._Commit("LATEST", "accepted", version))  # here it freezes
    new = acquire_lease(home, "host-b/1", "job-1")
    assert (home / "LATEST").read() == b"accepted"
    new.commit("LATEST", "newer")
    with pytest.raises(leases.ConflictError):
        (home / "LATEST").write("accepted", only_if=version)  # the delayed second write
    assert (home / "LATEST").read() == b"newer"
    new.release()
    old.release()
    assert (home / ".lease").exists()  # the release of a lost lease does not free it
    acquire_lease(home, "host-c/1").release()


def test_a_marker_that_is_deleted_between_two_runs_stays_deleted(home: StoragePath) -> None:
    with acquire_lease(home, "host-a/1") as lease:
        lease.commit("DONE", "yes")
    (home / "DONE").delete()
    with acquire_lease(home, "host-a/2"):
        assert not (home / "DONE").exists()


@every
def test_two_runs_that_commit_concurrently(home: StoragePath) -> None:
    """With repeated takeovers, all completed commits are in the order of the marker's versions."""
    done: list[tuple[Version, str]] = []

    def run(number: int) -> None:
        for attempt in range(4):
            lease = acquire_lease(home, f"host-{number}", "one-job")
            with contextlib.suppress(Interrupted):
                for step in range(5):
                    text = f"{number} {attempt} {step}"
                    done.append((lease.commit("LATEST", text), text))
            lease.release()

    at_the_same_time(run, 2)
    assert len({version for version, _ in done}) == len(done)
    marker = (home / "LATEST").fetch()
    assert marker is not None
    if isinstance(marker[1], int):  # an ETag has no order
        last = max((version, text) for version, text in done if isinstance(version, int))
        assert marker[1] >= last[0]
        assert marker[1] > last[0] or marker[0].decode() == last[1]


def test_an_outage_of_the_storage_longer_than_the_lease(tmp_path: Path) -> None:
    with running(tmp_path / "server") as server:
        home = storage_path(f"gs://{BUCKET}/run")
        lease = acquire_lease(home, "host-a/1")
        lease.commit("LATEST", "step-1")
        server.stop()
        time.sleep(1.5 * SECONDS)
        for act in (lease.check, lambda: lease.commit("LATEST", "step-2")):
            refused("the lease could not be renewed for", act, "start the same command again")
        server.start()
        began = lease._renewed_at
        wait_until(lambda: lease._renewed_at != began)
        lease.commit("LATEST", "step-3")  # no other process had taken it
        assert (home / "LATEST").read() == b"step-3"
        lease.release()


def test_a_lost_response_is_not_a_lost_lease(
    emulator: Emulator | S3Server, in_bucket: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", LONG_SECONDS)
    monkeypatch.setattr(retries, "DEADLINE_SECONDS", PATIENCE)
    odds = {"lost": 0.4, "reset": 0.1}
    with faults(emulator.url, odds, 3, emulator.scheme) as proxy, emulator.environment(proxy.url):
        lease = acquire_lease(in_bucket, "host-a/1")
        for step in range(20):
            with contextlib.suppress(Interrupted), request_deadline(0.05):  # so short that many end without a response
                lease._write(None)
            lease.commit("LATEST", f"step-{step}")
        assert proxy.counts["lost"] > 5
        proxy.odds = {}
        lease.commit("LATEST", "last")
        lease.release()
    assert (in_bucket / "LATEST").read() == b"last"


@buckets
def test_an_invalid_lease(home: StoragePath) -> None:
    (home / ".lease").write("{}")
    with raises(DataError, problem=r"\.lease: is not a lease \('commit'\)", fix="delete it if no run uses"):
        acquire_lease(home, "host-a/1")
