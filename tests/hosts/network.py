"""Real hosts on one machine: Linux network namespaces joined by a bridge, which know each other by name.

The names are those of the pods of a Kubernetes Indexed Job (`<job>-<i>.<service>`), and what a host sees is what such
a pod sees: one interface, its own `/etc/hosts`, an unknown name that fails at once, and a peer that may vanish without
a word. No link is ever made in the machine's own namespace; the bridge has a namespace of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TypeVar

import pytest

T = TypeVar("T")

FILES = Path("/etc/netns")  # `ip netns exec` mounts what lies in <FILES>/<namespace> over /etc; the folder itself stays
NETWORK_NAMESPACE = 0x40000000  # CLONE_NEWNET of sched.h
KILL_TIMEOUT = 10.0  # seconds for the processes of all hosts to be gone
_numbers = itertools.count()


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise RuntimeError(f"the program `{name}` is not here: install iproute2 and util-linux")
    return path


def _run(program: str, *arguments: str, text: str = "") -> str:
    command = [_program(program), *arguments]
    answer = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=60)
    if answer.returncode != 0:
        raise RuntimeError(f"`{program} {' '.join(arguments)}` failed: {answer.stderr.strip()}")
    return answer.stdout


def _ip(*arguments: str, text: str = "") -> str:
    return _run("ip", *arguments, text=text)


def _pids(namespace: str) -> list[int]:
    return [int(word) for word in _ip("netns", "pids", namespace).split()]


@functools.cache
def why_not() -> str:
    """Why hosts cannot be made on this machine, found by making one; empty where they can."""
    if not Path("/proc/self/ns/net").exists():
        return "hosts of their own need Linux network namespaces"
    if os.geteuid() != 0:
        return "network namespaces need root: run the tests as root"
    if shutil.which("ip") is None:
        return "network namespaces need the program `ip`: install iproute2"
    namespace = f"kubetune-{os.getpid()}-probe"
    try:
        _ip("netns", "add", namespace)
        _ip("-n", namespace, "link", "add", "br0", "type", "bridge")
        _ip("-n", namespace, "link", "add", "h0", "type", "veth", "peer", "name", "eth0")
        _ip("netns", "exec", namespace, "true")
        FILES.mkdir(exist_ok=True)
    except (RuntimeError, OSError) as error:
        return f"network namespaces cannot be made here: {error}"
    finally:
        subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)
    return ""


needs_root = pytest.mark.skipif(why_not() != "", reason=why_not())


@dataclass(frozen=True)
class Host:
    """One host: its namespace, its address, and the name of its link's end at the bridge."""

    namespace: str
    address: str
    hardware_address: str
    port: str


class Network:
    """Hosts with these names for the time of a `with` block; afterwards their processes are killed and all is removed.

    Host *i* of *names* has the address 10.77.0.<i+2>; several networks, also of several processes, do not see each
    other. `ValueError` for names that cannot stand in a hosts file; `RuntimeError` with the words of `ip` or `tc` for
    what the kernel refuses.
    """

    def __init__(self, names: Sequence[str]) -> None:
        if not 1 <= len(set(names)) == len(names) <= 250 or any(not name or name.split() != [name] for name in names):
            raise ValueError(f"a network needs 1 to 250 different host names without blanks, not {list(names)}")
        prefix = f"kubetune-{os.getpid()}-{next(_numbers)}"
        self._hub = f"{prefix}-hub"
        self.hosts: dict[str, Host] = {
            name: Host(f"{prefix}-{i}", f"10.77.0.{i + 2}", f"02:00:0a:4d:00:{i + 2:02x}", f"h{i}")
            for i, name in enumerate(names)
        }
        self._forgotten: set[str] = set()
        self._started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Network:
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def popen(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        stdout: int | IO[str] | IO[bytes] | None = None,
        stderr: int | IO[str] | IO[bytes] | None = None,
        hostname: str | None = None,
    ) -> subprocess.Popen[str]:
        """Start *command* on host *name*; the child is the command itself, so that signals and exit codes are its own.

        Pipes carry text; stdin is empty. With *hostname* the process sees that as its machine's name.
        """
        # Every program of this chain replaces itself by the next, so that the process id stays.
        chain = [_program("ip"), "netns", "exec", self._host(name).namespace]
        if hostname is not None:
            script = 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"'
            chain += [_program("unshare"), "--uts", _program("sh"), "-c", script, hostname]
        process = subprocess.Popen(
            [*chain, *command], env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, text=True
        )
        self._started.append(process)
        return process

    def inside(self, name: str, function: Callable[[], T]) -> T:
        """Call a function of this process that sees the links of host *name*, by addresses: names are not its host's.

        Connections that it opens, and processes that it starts, stay on that host.
        """
        path = Path("/run/netns", self._host(name).namespace)

        def call() -> T:
            with path.open() as file:
                if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), NETWORK_NAMESPACE) != 0:
                    raise OSError(ctypes.get_errno(), f"cannot enter {path}")
            return function()

        with ThreadPoolExecutor(1) as thread:  # its only thread goes there, and ends there
            return thread.submit(call).result()

    def pids(self, name: str) -> list[int]:
        """The processes that run on host *name*, whoever started them."""
        return _pids(self._host(name).namespace)

    def forget(self, name: str) -> None:
        """Take *name* out of every other host's `/etc/hosts`: a peer whose DNS record is not published yet."""
        self._host(name)
        self._forgotten.add(name)
        self._write_hosts_files()

    def remember(self, name: str) -> None:
        """Undo `forget`."""
        self._host(name)
        self._forgotten.discard(name)
        self._write_hosts_files()

    def cut(self, name: str) -> None:
        """Take the link of host *name* down at the bridge: what it sends and what is sent to it is silently lost."""
        _ip("-n", self._hub, "link", "set", self._host(name).port, "down")

    def join(self, name: str) -> None:
        """Undo `cut`."""
        _ip("-n", self._hub, "link", "set", self._host(name).port, "up")

    def slow(self, name: str, delay_ms: int = 0, rate_mbit: int | None = None) -> None:
        """Let what host *name* sends leave at *rate_mbit* (10^6 bits/s) at most and *delay_ms* later.

        Replaces what an earlier call set. What the host receives is not slowed. `RuntimeError`, and nothing is
        changed, where the kernel cannot delay (it has no netem).
        """
        if delay_ms < 0 or (rate_mbit is not None and rate_mbit <= 0) or (not delay_ms and rate_mbit is None):
            raise ValueError(f"a slow link needs delay_ms > 0 or rate_mbit > 0, not {delay_ms} and {rate_mbit}")
        if delay_ms:
            rate = [] if rate_mbit is None else ["rate", f"{rate_mbit}mbit"]
            try:
                self._queue(name, "replace", "netem", "delay", f"{delay_ms}ms", *rate)
            except RuntimeError as error:
                raise RuntimeError(
                    f"the link of {name} cannot be delayed by {delay_ms} ms: this kernel has no netem "
                    f"(CONFIG_NET_SCH_NETEM); a rate alone works without. {error}"
                ) from error
        else:
            assert rate_mbit is not None
            burst = max(32_000, rate_mbit * 1250)  # bytes: 10 ms of the rate, and never less than some packets
            self._queue(name, "replace", "tbf", "rate", f"{rate_mbit}mbit", "burst", str(burst), "latency", "50ms")

    def fast(self, name: str) -> None:
        """Undo `slow`."""
        self._queue(name, "replace", "noqueue")

    def _host(self, name: str) -> Host:
        if name not in self.hosts:
            raise ValueError(f"no host {name} in this network: there are {', '.join(self.hosts)}")
        return self.hosts[name]

    def _queue(self, name: str, verb: str, *discipline: str) -> None:
        _run("tc", "-n", self._host(name).namespace, "qdisc", verb, "dev", "eth0", "root", *discipline)

    def _build(self) -> None:
        hosts = self.hosts.values()
        for namespace in [self._hub, *(host.namespace for host in hosts)]:
            _ip("netns", "add", namespace)
        at_the_hub = ["link add br0 type bridge", "link set br0 up"]
        for host in hosts:
            own_end = f"eth0 address {host.hardware_address} netns {host.namespace}"
            at_the_hub += [f"link add {host.port} type veth peer name {own_end}"]
            at_the_hub += [f"link set {host.port} master br0 up"]
        _ip("-n", self._hub, "-batch", "-", text="\n".join(at_the_hub))
        for host in hosts:
            at_the_host = ["link set lo up", f"addr add {host.address}/24 dev eth0", "link set eth0 up"]
            # Were the neighbours found by ARP, a peer that was cut would give "no route to host" after three
            # seconds; pods are mostly reached through a router, and packets to a lost one are just lost.
            at_the_host += [
                f"neigh replace {peer.address} lladdr {peer.hardware_address} dev eth0 nud permanent"
                for peer in hosts
                if peer is not host
            ]
            _ip("-n", host.namespace, "-batch", "-", text="\n".join(at_the_host))
        for host in hosts:
            folder = FILES / host.namespace
            folder.mkdir(parents=True)
            # Nobody listens on the host's port 53: a resolver that asks DNS all the same is refused at once. By
            # "files" alone an unknown name is told "not known", as cluster DNS does, not "try again".
            (folder / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
            if Path("/etc/nsswitch.conf").exists():
                (folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        self._write_hosts_files()

    def _write_hosts_files(self) -> None:
        for reader, host in self.hosts.items():
            # As long with a name forgotten as without, and written over the old text: running processes have this
            # very file mounted, and must never see it empty.
            file = os.open(FILES / host.namespace / "hosts", os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.write(file, self._hosts_text(reader).encode())
            finally:
                os.close(file)

    def _hosts_text(self, reader: str) -> str:
        lines = ["127.0.0.1 localhost"]
        for name, host in self.hosts.items():
            if name == reader:  # a pod knows its own short name too
                lines.append(" ".join([host.address, *dict.fromkeys([name, name.partition(".")[0]])]))
            else:
                line = f"{host.address} {name}"
                lines.append(f"#{line[1:]}" if name in self._forgotten else line)
        return "\n".join(lines) + "\n"

    def _remove(self) -> None:
        namespaces = [*(host.namespace for host in self.hosts.values()), self._hub]
        try:
            self._kill([name for name in namespaces if Path("/run/netns", name).exists()])
        finally:
            for namespace in namespaces:
                if Path("/run/netns", namespace).exists():
                    subprocess.run([_program("ip"), "netns", "delete", namespace], capture_output=True, check=False)
                shutil.rmtree(FILES / namespace, ignore_errors=True)

    def _kill(self, namespaces: list[str]) -> None:
        for process in self._started:  # one may not have entered its namespace yet
            process.kill()
        deadline = time.monotonic() + KILL_TIMEOUT
        while left := [pid for namespace in namespaces for pid in _pids(namespace)]:
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes {left} of the hosts did not die within {KILL_TIMEOUT:.0f} s of SIGKILL")
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        for process in self._started:
            process.wait(timeout=KILL_TIMEOUT)
