"""Memory and processors that this process may use; a container's limits count, not the host's size."""

import contextlib
import mmap
import os
from pathlib import Path

import numpy as np

CGROUP = Path("/sys/fs/cgroup")


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text().split()[0])
    except (OSError, ValueError, IndexError):  # absent, or "max"
        return None


def memory_limit(cgroup: Path = CGROUP) -> int:
    """Bytes of memory: the machine's, or the container's limit (cgroup v2 or v1) where that is less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [_number(cgroup / "memory.max"), _number(cgroup / "memory" / "memory.limit_in_bytes")]
    return min([machine, *(limit for limit in limits if limit is not None)])


def memory_budget_default(cgroup: Path = CGROUP) -> int:
    """Bytes that decoded images may take: a quarter of the memory."""
    return memory_limit(cgroup) // 4


def usable_cpus(cgroup: Path = CGROUP) -> int:
    """Processors this process may keep busy, at least 1: its affinity and its container's quota, rounded up."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = _number(cgroup / "cpu" / "cpu.cfs_quota_us"), _number(cgroup / "cpu" / "cpu.cfs_period_us")
    with contextlib.suppress(OSError, ValueError):  # absent, or "max"
        quota, period = (int(word) for word in (cgroup / "cpu.max").read_text().split())
    if quota and period and quota > 0:
        cpus = min(cpus, -(-quota // period))
    return max(cpus, 1)


def fresh_array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros on pages of their own: aligned as DLPack wants them, and counted against the process only once written."""
    size = int(np.prod(shape)) * dtype.itemsize
    content = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            content.madvise(mmap.MADV_HUGEPAGE)  # else the first write to every 4 KB costs more than what it writes
    return np.frombuffer(content, dtype).reshape(shape)
