"""The lease: one holder of many, and nothing published by who lost it."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.storage.emulator import BUCKET, Emulator, environment, running
from tests.storage.faulty import faults
from trainer.errors import ConfigError, DataError, Interrupted
from trainer.storage import lease as leases
from trainer.storage.base import within
from trainer.storage.lease import Lease, holder_of, take
from trainer.storage.path import StoragePath, storage_path

ROOT = Path(__file__).parents[2]
SECONDS = 1.5

# Takes the lease, says so, then does what it is told, a line at a time, and says how that went.
HOLDER = """
import sys
from trainer.errors import TrainerError
from trainer.storage import lease as leases
from trainer.storage.path import storage_path
leases.LEASE_SECONDS = float(sys.argv[4])
def say(text): print(text, flush=True)
try:
    held = leases.take(storage_path(sys.argv[1]), sys.argv[2], sys.argv[3] or None)
    say("taken")
except TrainerError as error:
    sys.exit(say(f"{type(error).__name__}: {error}") or error.exit_code)
for line in sys.stdin:
    try:
        say(f"done {held.commit('LATEST', line.strip())}")
    except TrainerError as error:
        say(f"{type(error).__name__}: {error}")
held.release()
"""


class Holder:
    """Another process that holds, or wants, the lease of a folder."""

    def __init__(self, home: StoragePath, name: str, uid: str = "") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(home), name, uid, str(SECONDS)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip

    def hear(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def tell(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

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
    """An empty folder in a bucket; on disk as well, by parametrisation."""
    return (
        storage_path(tmp_path / "home")
        if getattr(request, "param", "") == "local"
        else request.getfixturevalue("in_bucket")
    )


here_and_there = pytest.mark.parametrize("home", ["local", "bucket"], indirect=True)


@pytest.fixture
def holder(home: StoragePath) -> Iterator[Holder]:
    made = Holder(home, "host-a/1", "job-1")
    assert made.hear() == "taken"
    yield made
    made.end()


def refusal(act: object) -> str:
    with pytest.raises(Interrupted) as error:
        act()  # type: ignore[operator]
    return str(error.value)


@here_and_there
def test_a_lease_is_taken_renewed_and_given_back(home: StoragePath) -> None:
    with take(home, "host-a/1") as lease:
        first = (home / ".lease").version()
        time.sleep(SECONDS)
        assert (home / ".lease").version() != first
        lease.check()
        assert (home / "LATEST").version() is None
        version = lease.commit("LATEST", "step-1")
        assert lease.commit("LATEST", "step-2") != version
        assert lease.commit("DONE", "") == (home / "DONE").version()
    assert (home / "LATEST").read() == b"step-2"
    assert refusal(lease.check) == f"{home}: the lease was given back; nothing more is published here by this process"
    began = time.monotonic()
    take(home, "host-b/1").release()
    assert time.monotonic() - began < SECONDS / 2


@here_and_there
def test_a_plan_names_who_would_keep_it_out(home: StoragePath) -> None:
    assert holder_of(home, None) is None
    with take(home, "host-a/1", "job-1"):
        assert str(holder_of(home, None)).startswith("host-a/1, last renewed at 20")
        assert str(holder_of(home, "job-2")).startswith("host-a/1, ")
        assert holder_of(home, "job-1") is None  # its own Job would take it at once
    assert holder_of(home, None) is None
    (home / ".lease").write("rubbish")
    with pytest.raises(DataError, match="is not a lease"):
        holder_of(home, None)


@here_and_there
def test_one_of_many_takes_it(home: StoragePath) -> None:
    taken: list[Lease] = []
    refused: list[str] = []

    def want(number: int) -> None:
        try:
            taken.append(take(home, f"host-{number}", wait=number % 2 == 0))
        except ConfigError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=want, args=(number,)) for number in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(taken) == 1
    assert len(refused) == 5
    winner = taken[0]._state.holder
    assert set(refused) == {f"{home}: is in use by {winner}; choose another output_dir, or end that run first"}
    taken[0].commit("LATEST", "1")
    taken[0].release()


def test_another_process_is_refused_while_it_is_renewed(home: StoragePath, holder: Holder) -> None:
    with pytest.raises(ConfigError) as error:
        take(home, "host-b/1", "job-2", note="")
    assert str(error.value) == (
        f"{home}: is in use by host-a/1 (uid job-1); choose another output_dir, or end that run first"
    )
    assert error.value.exit_code == 2
    other = Holder(home, "host-c/1", "job-3")
    assert other.hear().startswith("ConfigError")
    assert other.process.wait(10) == 2
    other.end()
    holder.tell("step-1")
    assert holder.hear().startswith("done")


def test_the_same_job_takes_over_at_once(home: StoragePath, holder: Holder) -> None:
    holder.tell("step-1")
    assert holder.hear().startswith("done")
    began = time.monotonic()
    with take(home, "host-b/1", "job-1") as lease:
        assert time.monotonic() - began < SECONDS / 2
        lease.commit("LATEST", "step-2")
        holder.tell("step-1 again")
        assert holder.hear().startswith(f"Interrupted: {home}: the lease was taken over by host-b/1 (uid job-1)")
        lease.check()
        assert (home / "LATEST").read() == b"step-2"


def test_a_dead_holder_is_waited_out(home: StoragePath, holder: Holder) -> None:
    os.kill(holder.process.pid, signal.SIGKILL)
    with pytest.raises(ConfigError, match="is in use by host-a/1"):
        take(home, "host-b/1", "job-2", wait=False)
    began = time.monotonic()
    with take(home, "host-b/1", "job-2"):
        assert SECONDS < time.monotonic() - began < 3 * SECONDS


@here_and_there
def test_a_frozen_holder_that_thaws_can_publish_nothing(home: StoragePath, holder: Holder) -> None:
    holder.tell("step-1")
    assert holder.hear().startswith("done")
    os.kill(holder.process.pid, signal.SIGSTOP)
    holder.tell("step-2 of the frozen")
    with take(home, "host-b/1", "job-2") as lease:
        lease.commit("LATEST", "step-2")
        os.kill(holder.process.pid, signal.SIGCONT)
        assert holder.hear().startswith(f"Interrupted: {home}: ")
        assert (home / "LATEST").read() == b"step-2"
        said = ""
        while "the lease was taken over by host-b/1 (uid job-2)" not in said:  # until its renewal has told it why
            holder.tell("step-3 of the thawed")
            said = holder.hear()
            assert said.startswith(f"Interrupted: {home}: ")
        lease.commit("LATEST", "step-3")
    assert (home / "LATEST").read() == b"step-3"


@here_and_there
@pytest.mark.parametrize("before", [None, "step-1"])
def test_frozen_between_the_check_and_the_commit(home: StoragePath, before: str | None) -> None:
    """The clock plays no part: even a holder that has just checked cannot get past a takeover."""
    old = take(home, "host-a/1", "job-1")
    if before:
        old.commit("LATEST", before)
    old.check()  # ... and here it freezes
    new = take(home, "host-b/1", "job-1")
    assert "taken over by host-b/1" in refusal(lambda: old._write(leases._Commit("LATEST", "late", None)))
    assert ((home / "LATEST").fetch() or (None,))[0] == (before.encode() if before else None)
    new.release()
    old.release()


@here_and_there
@pytest.mark.parametrize("before", [None, "step-1"])
def test_frozen_between_the_two_writes_of_a_commit(home: StoragePath, before: str | None) -> None:
    """What the lease has accepted is published, by the next holder if need be; and never twice."""
    old = take(home, "host-a/1", "job-1")
    if before:
        old.commit("LATEST", before)
    version = (home / "LATEST").version()
    old._write(leases._Commit("LATEST", "accepted", version))  # ... and here it freezes
    new = take(home, "host-b/1", "job-1")
    assert (home / "LATEST").read() == b"accepted"
    new.commit("LATEST", "newer")
    with pytest.raises(leases.Conflict):
        (home / "LATEST").write("accepted", only_if=version)  # the second write, thawed
    assert (home / "LATEST").read() == b"newer"
    new.release()
    old.release()
    assert (home / ".lease").exists()  # ... and a release by who lost it does not free it for others
    take(home, "host-c/1").release()


def test_a_marker_that_is_deleted_between_two_runs_stays_deleted(home: StoragePath) -> None:
    with take(home, "host-a/1") as lease:
        lease.commit("DONE", "yes")
    (home / "DONE").delete()
    with take(home, "host-a/2"):
        assert not (home / "DONE").exists()


@here_and_there
def test_two_runs_that_commit_as_fast_as_they_can(home: StoragePath) -> None:
    """Taken over again and again: every commit that was said to be done is in the order of the markers' versions."""
    done: list[tuple[int, str]] = []

    def run(name: str) -> None:
        for attempt in range(4):
            lease = take(home, name, "one-job")
            try:
                for step in range(5):
                    text = f"{name} {attempt} {step}"
                    done.append((lease.commit("LATEST", text), text))
            except Interrupted:
                pass
            lease.release()

    threads = [threading.Thread(target=run, args=(name,)) for name in ("a", "b")]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len({version for version, _ in done}) == len(done)
    marker = (home / "LATEST").fetch()
    assert marker is not None
    last = max(done)
    assert marker[1] >= last[0]
    assert marker[1] > last[0] or marker[0].decode() == last[1]


def test_a_storage_away_for_longer_than_the_lease(tmp_path: Path) -> None:
    with running(tmp_path / "server") as server:
        home = storage_path(f"gs://{BUCKET}/run")
        lease = take(home, "host-a/1")
        lease.commit("LATEST", "step-1")
        server.stop()
        time.sleep(1.5 * SECONDS)
        assert "the lease could not be renewed for" in refusal(lease.check)
        assert "start the same command again" in refusal(lambda: lease.commit("LATEST", "step-2"))
        server.start()
        began = lease._renewed_at
        while lease._renewed_at == began:
            time.sleep(0.05)
        lease.commit("LATEST", "step-3")  # nobody had taken it: it goes on
        assert (home / "LATEST").read() == b"step-3"
        lease.release()


def test_a_lost_answer_is_not_a_lost_lease(
    emulator: Emulator, in_bucket: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 20.0)
    with faults(emulator.url, {"lost": 0.4, "reset": 0.1}, seed=3) as proxy, environment(proxy.url):
        lease = take(in_bucket, "host-a/1")
        for step in range(20):
            with contextlib.suppress(Interrupted), within(0.05):  # so short that many end without an answer
                lease._write(None)
            lease.commit("LATEST", f"step-{step}")
        assert proxy.counts["lost"] > 5
        proxy.odds = {}
        lease.commit("LATEST", "last")
        lease.release()
    assert (in_bucket / "LATEST").read() == b"last"


def test_a_lease_that_is_none(home: StoragePath) -> None:
    (home / ".lease").write("{}")
    with pytest.raises(leases.DataError, match=r"\.lease: is not a lease \('commit'\); delete it if no run uses"):
        take(home, "host-a/1")
