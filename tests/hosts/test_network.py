"""Network hosts: names, connections, signals, cut links, and complete removal."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

from tests.hosts.jobs import names
from tests.hosts.network import FILES, Network, needs_root
from tests.waiting import PATIENCE

pytestmark = needs_root
FIRST, SECOND, THIRD = HOSTS = names(3)

# Sends every client its address, then echoes what it receives.
SERVER = """
import contextlib, socket, sys
with socket.create_server((sys.argv[1], 5000)) as server:
    print("ready", flush=True)
    while True:
        connection, (address, _) = server.accept()
        with connection, contextlib.suppress(ConnectionError):  # the client closes it at any time
            connection.sendall(address.encode())
            while chunk := connection.recv(65536):
                connection.sendall(chunk)
"""
RESOLVE = """
import socket, sys, time
for name in sys.argv[1:]:
    began = time.monotonic()
    try:
        address = socket.getaddrinfo(name, 1, type=socket.SOCK_STREAM)[0][4][0]
    except socket.gaierror as error:
        address = "unknown" if error.errno == socket.EAI_NONAME else repr(error)
    print(address, time.monotonic() - began < 20)
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


def python(network: Network, host: str, code: str, *arguments: str, hostname: str | None = None) -> Popen[str]:
    command = [sys.executable, "-I", "-c", code, *arguments]
    return network.popen(host, command, env={}, stdout=PIPE, stderr=PIPE, hostname=hostname)


def output_of(network: Network, host: str, code: str, *arguments: str) -> list[str]:
    process = python(network, host, code, *arguments)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    return output.split()


def serve(network: Network, host: str) -> Popen[str]:
    server = python(network, host, SERVER, host)
    wait_for(server, "ready")
    return server


def connect(network: Network, host: str, peer: str, port: int = 5000, timeout: float = PATIENCE) -> socket.socket:
    """Connect from one host to another, from this process."""
    address = (network.hosts[peer].address, port)
    return network.inside(host, lambda: socket.create_connection(address, timeout=timeout))


def connects(network: Network, host: str, peer: str, timeout: float = PATIENCE) -> bool:
    with contextlib.suppress(TimeoutError), connect(network, host, peer, timeout=timeout):
        return True
    return False


def refuses(network: Network, host: str, peer: str, port: int = 5000) -> bool:
    """True if a peer can be reached and the port is closed."""
    with contextlib.suppress(ConnectionRefusedError), connect(network, host, peer, port):
        return False
    return True


def wait_for(process: Popen[str], line: str) -> None:
    """Read the output of a process up to this line; kills it if it does not come."""
    assert process.stdout is not None
    timer = threading.Timer(PATIENCE, process.kill)
    timer.start()
    try:
        assert any(printed.strip() == line for printed in process.stdout), f"the process ended without {line!r}"
    finally:
        timer.cancel()


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def links() -> set[str]:
    return set(os.listdir("/sys/class/net"))


def leftovers(network: Network) -> list[str]:
    """Existing namespaces of the network, and their folders in /etc."""
    prefix = network.hosts[FIRST].namespace.rpartition("-")[0]
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split("\n")
    folders = os.listdir(FILES) if FILES.exists() else []
    return [entry for entry in [*listed, *folders] if entry.startswith(f"{prefix}-")]


def test_hosts_connect_by_name_and_exchange_bytes(network: Network) -> None:
    code = """
import socket, sys
with socket.create_connection((sys.argv[1], 5000)) as connection:
    connection.sendall(b"hello")
    connection.shutdown(socket.SHUT_WR)
    while chunk := connection.recv(1000):
        print(chunk.decode(), end="")
"""
    serve(network, FIRST)
    for i, host in enumerate(HOSTS):
        assert network.hosts[host].address == f"10.77.0.{i + 2}"
        assert output_of(network, host, code, FIRST) == [f"10.77.0.{i + 2}hello"]


def test_a_host_resolves_its_peers_and_its_own_short_name_only(network: Network) -> None:
    names = [*HOSTS, "localhost", "train-1", "train-0", "train-9.train-workers", "example.com"]
    output = output_of(network, SECOND, RESOLVE, *names)
    assert output[::2] == ["10.77.0.2", "10.77.0.3", "10.77.0.4", "127.0.0.1", "10.77.0.3"] + 3 * ["unknown"]
    assert set(output[1::2]) == {"True"}  # each without the timeout of a DNS query


def test_a_function_is_called_inside_a_host_and_its_connections_use_that_host(network: Network) -> None:
    serve(network, FIRST)
    before = links()
    with connect(network, SECOND, FIRST) as connection:
        assert connection.getsockname()[0] == network.hosts[SECOND].address
        assert connection.recv(1000).decode() == network.hosts[SECOND].address
    assert network.inside(SECOND, lambda: sorted(name for _, name in socket.if_nameindex())) == ["eth0", "lo"]
    assert links() == before
    with pytest.raises(ZeroDivisionError):
        network.inside(SECOND, lambda: 1 // 0)


@pytest.mark.parametrize("hostname", [None, "train-0"])
def test_signals_reach_the_command_and_its_exit_code_comes_back(network: Network, hostname: str | None) -> None:
    code = """
import os, signal, socket, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print(os.getpid(), socket.gethostname(), flush=True)
time.sleep(900)
"""
    stopped, killed = (python(network, FIRST, code, hostname=hostname) for _ in range(2))
    for process in (stopped, killed):
        assert process.stdout is not None
        assert process.stdout.readline().split() == [str(process.pid), hostname or os.uname().nodename]
    assert sorted(network.pids(FIRST)) == sorted([stopped.pid, killed.pid])
    assert network.pids(SECOND) == []
    stopped.send_signal(signal.SIGTERM)
    killed.kill()
    assert stopped.wait(timeout=PATIENCE) == 75
    assert killed.wait(timeout=PATIENCE) == -signal.SIGKILL
    assert network.pids(FIRST) == []


def test_the_command_runs_in_its_folder_with_its_environment(network: Network, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        process = network.popen(FIRST, ["/bin/sh", "-c", "pwd; echo $INDEX; exit 3"], env={"INDEX": "0"}, cwd=tmp_path, stdout=log)  # fmt: skip
        assert process.wait(timeout=PATIENCE) == 3
    assert (tmp_path / "log").read_text() == f"{tmp_path}\n0\n"


def test_a_cut_host_is_unreachable_until_it_joins_again(network: Network) -> None:
    serve(network, FIRST)
    assert connects(network, SECOND, FIRST)
    assert refuses(network, SECOND, FIRST, port=5001)
    network.cut(FIRST)
    for host, peer in [(SECOND, FIRST), (FIRST, SECOND)]:
        assert not connects(network, host, peer, timeout=4)  # after three seconds ARP would report an unknown host
    assert refuses(network, THIRD, SECOND)  # the others still connect
    network.join(FIRST)
    assert connects(network, SECOND, FIRST)
    assert refuses(network, FIRST, SECOND)


def test_an_open_connection_outlives_a_cut(network: Network) -> None:
    serve(network, FIRST)
    with connect(network, SECOND, FIRST) as connection:
        assert connection.recv(1000)
        connection.settimeout(0.5)
        network.cut(FIRST)
        connection.sendall(b"?")
        with pytest.raises(TimeoutError):
            connection.recv(1)
        network.join(FIRST)
        connection.settimeout(PATIENCE)
        assert connection.recv(1) == b"?"


def test_a_forgotten_name_is_unknown_to_all_others_until_remembered(network: Network) -> None:
    watcher = python(network, SECOND, WATCH, FIRST)  # a running process reads the change too
    for _ in range(2):
        wait_for(watcher, "10.77.0.2")
        network.forget(FIRST)
        wait_for(watcher, "unknown")
        assert output_of(network, THIRD, RESOLVE, FIRST, SECOND)[::2] == ["unknown", "10.77.0.3"]
        assert output_of(network, FIRST, RESOLVE, FIRST, SECOND)[::2] == ["10.77.0.2", "10.77.0.3"]
        network.remember(FIRST)
        assert output_of(network, THIRD, RESOLVE, FIRST, SECOND)[::2] == ["10.77.0.2", "10.77.0.3"]


def test_the_other_names_resolve_while_one_is_forgotten(network: Network) -> None:
    code = "import socket, sys; print(*{socket.gethostbyname(sys.argv[1]) for _ in range(5000)})"
    watcher = python(network, SECOND, code, FIRST)
    changes = 0
    while watcher.poll() is None:
        network.forget(THIRD)
        network.remember(THIRD)
        changes += 2
    assert watcher.communicate() == ("10.77.0.2\n", "")
    assert changes > 100


def start_a_daemon(network: Network, host: str) -> int:
    """Start a process in its own session, not our child, which ignores SIGTERM and is stopped; returns its id."""
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
    assert process.wait(timeout=PATIENCE) == 0
    assert network.pids(host) == [pid]
    return pid


def test_everything_is_removed(network: Network) -> None:
    before = links()
    with Network(HOSTS) as other:
        assert len(leftovers(other)) == 4 + 3  # namespaces, and folders with hosts files
        assert links() == before
        child = serve(other, SECOND)
        daemon = start_a_daemon(other, THIRD)
        assert running(child.pid)
        assert running(daemon)
    assert child.returncode == -signal.SIGKILL
    assert not running(daemon)
    assert leftovers(other) == []
    assert links() == before
    assert len(leftovers(network)) == 4 + 3


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_everything_is_removed_after_an_exception(error: type[BaseException]) -> None:
    network = Network(HOSTS)
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
    assert leftovers(network) == []


def test_everything_is_removed_after_an_error_in_setup() -> None:
    network = Network(HOSTS)
    taken = network.hosts[THIRD].namespace
    FILES.mkdir(exist_ok=True)
    (FILES / taken).touch()  # at the path of the last host's folder
    try:
        with pytest.raises(FileExistsError), network:
            pass
        assert leftovers(network) == [taken]
    finally:
        (FILES / taken).unlink()


def test_two_networks_are_isolated(network: Network) -> None:
    with Network(HOSTS) as other:
        server, same_name = serve(network, FIRST), serve(other, FIRST)
        other.forget(FIRST)
        assert output_of(network, SECOND, RESOLVE, FIRST)[0] == "10.77.0.2"
        assert output_of(other, SECOND, RESOLVE, FIRST)[0] == "unknown"
        other.remember(FIRST)
        other.cut(FIRST)
        assert connects(network, SECOND, FIRST)
        assert not connects(other, SECOND, FIRST, timeout=0.5)
        other.join(FIRST)
        server.kill()
        server.wait(timeout=PATIENCE)
        assert refuses(network, SECOND, FIRST)
        assert connects(other, SECOND, FIRST)
        assert same_name.poll() is None
    serve(network, FIRST)
    assert connects(network, SECOND, FIRST)
