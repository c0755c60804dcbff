"""The hosts the host tests run on: names, bytes, signals, cut links, and nothing left behind."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

from tests.hosts.network import FILES, Network, needs_root

pytestmark = needs_root
FIRST, SECOND, THIRD = NAMES = [f"train-{i}.train-workers" for i in range(3)]

# Answers every connection: "hash" reads to the end and tells a digest, "echo" gives back each piece at once.
SERVER = """
import hashlib, socket, sys
kind, name = sys.argv[1:]
with socket.create_server((name, 5000)) as server:
    print("ready", flush=True)
    while True:
        connection, (address, _) = server.accept()
        with connection:
            digest = hashlib.sha256()
            while piece := connection.recv(65536):
                digest.update(piece)
                if kind == "echo":
                    connection.sendall(piece)
            if kind == "hash":
                connection.sendall(f"{address} {digest.hexdigest()}".encode())
"""
SEND = """
import hashlib, socket, sys, time
name, size = sys.argv[1], int(sys.argv[2])
data = bytes(i % 251 for i in range(1000)) * (size // 1000)
with socket.create_connection((name, 5000), timeout=20) as connection:
    began = time.monotonic()
    connection.sendall(data)
    connection.shutdown(socket.SHUT_WR)
    answer = connection.recv(1000).decode()
print(time.monotonic() - began, answer, hashlib.sha256(data).hexdigest())
"""
CONNECT = """
import socket, sys, time
began = time.monotonic()
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=float(sys.argv[3])).close()
    print("connected", time.monotonic() - began)
except OSError as error:
    print(type(error).__name__, time.monotonic() - began)
"""
RESOLVE = """
import socket, sys, time
for name in sys.argv[1:]:
    began = time.monotonic()
    try:
        answer = socket.getaddrinfo(name, 1, type=socket.SOCK_STREAM)[0][4][0]
    except socket.gaierror as error:
        answer = "unknown" if error.errno == socket.EAI_NONAME else repr(error)
    print(answer, time.monotonic() - began < 1)
"""
WATCH = """
import socket, sys, time
while True:
    try:
        print(socket.gethostbyname(sys.argv[1]), flush=True)
    except socket.gaierror:
        print("unknown", flush=True)
    time.sleep(0.001)
"""
TALK = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 5000), timeout=0.5) as connection:
    connection.sendall(b"?")
    while True:
        try:
            connection.recv(1) or sys.exit("closed")
            print("answer", flush=True)
            time.sleep(0.02)
            connection.sendall(b"?")
        except TimeoutError:
            print("silence", flush=True)
"""


def python(network: Network, host: str, code: str, *arguments: str, hostname: str | None = None) -> Popen[str]:
    command = [sys.executable, "-I", "-c", code, *arguments]
    return network.popen(host, command, env={}, stdout=PIPE, stderr=PIPE, hostname=hostname)


def ask(network: Network, host: str, code: str, *arguments: str) -> list[str]:
    process = python(network, host, code, *arguments)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return output.split()


def serve(network: Network, host: str, kind: str = "hash") -> Popen[str]:
    server = python(network, host, SERVER, kind, host)
    wait_for(server, "ready")
    return server


def wait_for(process: Popen[str], line: str) -> None:
    """Read what the process says until it says this; one that does not within 20 s is killed."""
    assert process.stdout is not None
    patience = threading.Timer(20, process.kill)
    patience.start()
    try:
        assert any(said.strip() == line for said in process.stdout), f"it ended without {line!r}"
    finally:
        patience.cancel()


def running(pid: int) -> bool:
    """Whether this process is there and not only waiting for its parent to read its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def links() -> set[str]:
    """The links of the machine's own namespace."""
    return set(os.listdir("/sys/class/net"))


def traces(network: Network) -> list[str]:
    """What there is of the network's namespaces and of their files in /etc."""
    prefix = network.hosts[FIRST].namespace.rpartition("-")[0]
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split("\n")
    folders = os.listdir(FILES) if FILES.exists() else []
    return [entry for entry in [*listed, *folders] if entry.startswith(f"{prefix}-")]


@pytest.fixture
def network() -> Iterator[Network]:
    with Network(NAMES) as made:
        yield made


def test_hosts_find_each_other_by_name_and_exchange_bytes(network: Network) -> None:
    serve(network, FIRST)
    for i, host in enumerate(NAMES):
        _, address, received, sent = ask(network, host, SEND, FIRST, "1000000")
        assert address == network.hosts[host].address == f"10.77.0.{i + 2}"
        assert received == sent


def test_a_host_knows_its_peers_and_its_own_short_name_and_nobody_else(network: Network) -> None:
    names = [*NAMES, "localhost", "train-1", "train-0", "train-9.train-workers", "example.com"]
    answer = ask(network, SECOND, RESOLVE, *names)
    assert answer[::2] == ["10.77.0.2", "10.77.0.3", "10.77.0.4", "127.0.0.1", "10.77.0.3"] + 3 * ["unknown"]
    assert set(answer[1::2]) == {"True"}  # each in less than a second


def test_a_function_is_called_inside_a_host_and_its_connections_stay_there(network: Network) -> None:
    serve(network, FIRST)
    address = (network.hosts[FIRST].address, 5000)
    before = links()
    with network.inside(SECOND, lambda: socket.create_connection(address, timeout=5)) as connection:
        assert connection.getsockname()[0] == network.hosts[SECOND].address
        connection.sendall(b"hello")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1000).decode().startswith(network.hosts[SECOND].address)
    assert network.inside(SECOND, lambda: sorted(name for _, name in socket.if_nameindex())) == ["eth0", "lo"]
    assert links() == before
    with pytest.raises(ZeroDivisionError):
        network.inside(SECOND, lambda: 1 // 0)


def test_only_lo_and_the_link_are_seen_by_a_host(network: Network) -> None:
    assert ask(network, FIRST, "import socket; print(*sorted(n for _, n in socket.if_nameindex()))") == ["eth0", "lo"]


@pytest.mark.parametrize("hostname", [None, "train-0"])
def test_signals_reach_the_command_and_its_exit_code_comes_back(network: Network, hostname: str | None) -> None:
    code = """
import os, signal, socket, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print(os.getpid(), socket.gethostname(), flush=True)
time.sleep(60)
"""
    stopped, killed = (python(network, FIRST, code, hostname=hostname) for _ in range(2))
    for process in (stopped, killed):
        assert process.stdout is not None
        assert process.stdout.readline().split() == [str(process.pid), hostname or os.uname().nodename]
    assert sorted(network.pids(FIRST)) == sorted([stopped.pid, killed.pid])
    assert network.pids(SECOND) == []
    stopped.send_signal(signal.SIGTERM)
    killed.kill()
    assert stopped.wait(timeout=10) == 75
    assert killed.wait(timeout=10) == -signal.SIGKILL
    assert network.pids(FIRST) == []


def test_the_command_runs_in_its_folder_with_its_environment(network: Network, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        process = network.popen(FIRST, ["/bin/sh", "-c", "pwd; echo $INDEX; exit 3"], env={"INDEX": "0"}, cwd=tmp_path, stdout=log)  # fmt: skip
        assert process.wait(timeout=10) == 3
    assert (tmp_path / "log").read_text() == f"{tmp_path}\n0\n"


def test_a_cut_host_is_silent_until_it_joins_again(network: Network) -> None:
    serve(network, FIRST)
    assert ask(network, SECOND, CONNECT, FIRST, "5000", "5")[0] == "connected"
    assert ask(network, SECOND, CONNECT, FIRST, "5001", "5")[0] == "ConnectionRefusedError"  # nobody listens there
    network.cut(FIRST)
    # Longer than the three seconds after which an unanswered ARP would tell the caller that there is no such host.
    waits = [python(network, host, CONNECT, peer, "5000", "4") for host, peer in [(SECOND, FIRST), (FIRST, SECOND)]]
    for process in waits:
        error, seconds = process.communicate(timeout=20)[0].split()
        assert error == "TimeoutError"
        assert 3.9 < float(seconds) < 8
    assert ask(network, THIRD, CONNECT, SECOND, "5000", "5")[0] == "ConnectionRefusedError"  # the others still talk
    network.join(FIRST)
    assert ask(network, SECOND, CONNECT, FIRST, "5000", "5")[0] == "connected"
    assert ask(network, FIRST, CONNECT, SECOND, "5000", "5")[0] == "ConnectionRefusedError"


def test_an_open_connection_outlives_a_cut(network: Network) -> None:
    serve(network, FIRST, "echo")
    client = python(network, SECOND, TALK, FIRST)
    wait_for(client, "answer")
    network.cut(FIRST)
    wait_for(client, "silence")
    network.join(FIRST)
    wait_for(client, "answer")
    assert client.poll() is None


def test_a_forgotten_name_is_unknown_to_all_others_until_remembered(network: Network) -> None:
    watcher = python(network, SECOND, WATCH, FIRST)  # one that runs all the while sees it as well
    for _ in range(2):
        wait_for(watcher, "10.77.0.2")
        network.forget(FIRST)
        wait_for(watcher, "unknown")
        assert ask(network, THIRD, RESOLVE, FIRST, SECOND)[::2] == ["unknown", "10.77.0.3"]
        assert ask(network, FIRST, RESOLVE, FIRST, SECOND)[::2] == ["10.77.0.2", "10.77.0.3"]
        network.remember(FIRST)
        assert ask(network, THIRD, RESOLVE, FIRST, SECOND)[::2] == ["10.77.0.2", "10.77.0.3"]


def test_the_other_names_stay_known_while_one_is_forgotten(network: Network) -> None:
    code = "import socket, sys; print(*{socket.gethostbyname(sys.argv[1]) for _ in range(5000)})"
    watcher = python(network, SECOND, code, FIRST)
    changes = 0
    while watcher.poll() is None:
        network.forget(THIRD)
        network.remember(THIRD)
        changes += 2
    assert watcher.communicate() == ("10.77.0.2\n", "")
    assert changes > 100


def test_a_slow_host_sends_slowly_and_a_fast_one_does_not(network: Network) -> None:
    serve(network, FIRST)

    def seconds(sender: str) -> float:
        return float(ask(network, sender, SEND, FIRST, "2000000")[0])

    assert seconds(SECOND) < 1.5
    network.slow(SECOND, rate_mbit=8)  # 2 MB at 1 MB/s
    assert seconds(SECOND) > 1.7
    assert seconds(THIRD) < 1.5
    network.cut(SECOND)
    network.join(SECOND)
    network.slow(SECOND, rate_mbit=32)
    assert 0.4 < seconds(SECOND) < 1.5
    network.fast(SECOND)
    network.fast(SECOND)
    assert seconds(SECOND) < 1.5


def test_a_delay_is_had_or_the_kernel_is_named_as_the_reason(network: Network) -> None:
    serve(network, FIRST)
    network.slow(SECOND, rate_mbit=8)
    try:
        network.slow(SECOND, delay_ms=200)
        refusal = ""
    except RuntimeError as error:
        refusal = str(error)
    if refusal:
        start = f"the link of {SECOND} cannot be delayed by 200 ms: this kernel has no netem (CONFIG_NET_SCH_NETEM);"
        assert refusal.startswith(start)
        assert float(ask(network, SECOND, SEND, FIRST, "1000000")[0]) > 0.8  # the rate of before still holds
    else:
        assert float(ask(network, SECOND, CONNECT, FIRST, "5000", "5")[1]) > 0.19


def start_a_daemon(network: Network, host: str) -> int:
    """A process in a session of its own, not our child, which ignores SIGTERM and is stopped; its process id."""
    code = """
import os, signal, time
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(os.getpid(), flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)
"""
    process = python(network, host, code)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert process.wait(timeout=10) == 0
    assert network.pids(host) == [pid]
    return pid


def test_nothing_is_left_behind(network: Network) -> None:
    before = links()
    with Network(NAMES) as other:
        assert len(traces(other)) == 4 + 3  # namespaces, and folders with hosts files
        assert links() == before
        child = serve(other, SECOND)
        daemon = start_a_daemon(other, THIRD)
        assert running(child.pid)
        assert running(daemon)
    assert child.returncode == -signal.SIGKILL
    assert not running(daemon)
    assert traces(other) == []
    assert links() == before
    assert len(traces(network)) == 4 + 3


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_behind_by_an_exception(error: type[BaseException]) -> None:
    network = Network(NAMES)
    daemon = 0

    def fail() -> None:
        nonlocal daemon
        with network:
            daemon = start_a_daemon(network, FIRST)
            network.cut(FIRST)
            raise error

    with pytest.raises(error):
        fail()
    assert not running(daemon)
    assert traces(network) == []


def test_nothing_is_left_behind_by_a_network_that_cannot_be_built() -> None:
    network = Network(NAMES)
    taken = network.hosts[THIRD].namespace
    FILES.mkdir(exist_ok=True)
    (FILES / taken).touch()  # stands where the folder of the last host would be made
    try:
        with pytest.raises(FileExistsError), network:
            pass
        assert traces(network) == [taken]
    finally:
        (FILES / taken).unlink()


def test_two_networks_do_not_disturb_each_other(network: Network) -> None:
    with Network(NAMES) as other:
        server, same_name = serve(network, FIRST), serve(other, FIRST)
        other.forget(FIRST)
        assert ask(network, SECOND, RESOLVE, FIRST)[0] == "10.77.0.2"
        assert ask(other, SECOND, RESOLVE, FIRST)[0] == "unknown"
        other.remember(FIRST)
        other.cut(FIRST)
        assert ask(network, SECOND, CONNECT, FIRST, "5000", "5")[0] == "connected"
        assert ask(other, SECOND, CONNECT, FIRST, "5000", "0.5")[0] == "TimeoutError"
        other.join(FIRST)
        server.kill()
        server.wait(timeout=10)
        assert ask(network, SECOND, CONNECT, FIRST, "5000", "5")[0] == "ConnectionRefusedError"
        assert ask(other, SECOND, CONNECT, FIRST, "5000", "5")[0] == "connected"
        assert same_name.poll() is None
    server = serve(network, FIRST)
    assert ask(network, SECOND, CONNECT, FIRST, "5000", "5")[0] == "connected"


@pytest.mark.parametrize("names", [[], ["a", "a"], ["a b"], [""], ["a\n"]])
def test_names_that_cannot_be_hosts_are_refused(names: list[str]) -> None:
    message = f"a network needs 1 to 250 different host names without blanks, not {names}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Network(names)


def test_a_host_that_is_not_there_is_named(network: Network) -> None:
    message = f"no host train-3 in this network: there are {', '.join(NAMES)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        network.cut("train-3")


@pytest.mark.parametrize(("delay_ms", "rate_mbit"), [(0, None), (-1, 10), (0, 0)])
def test_a_slow_link_needs_a_delay_or_a_rate(network: Network, delay_ms: int, rate_mbit: int | None) -> None:
    message = f"a slow link needs delay_ms > 0 or rate_mbit > 0, not {delay_ms} and {rate_mbit}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        network.slow(FIRST, delay_ms, rate_mbit)
