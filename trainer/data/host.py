"""Memory and processors that this process may use, by the limits of the container (cgroup) and of the machine."""

import contextlib
import mmap
import os
from pathlib import Path

import numpy as np

CGROUP = Path("/sys/fs/cgroup")


def _numbers(file: Path) -> list[int]:
    try:
        return [int(text) for text in file.read_text().split()]
    except (OSError, ValueError):  # the file is missing, or holds "max"
        return []


def memory_limit(cgroup: Path = CGROUP) -> int:
    """Bytes of memory: of the machine, or the container's limit (cgroup v2 or v1) if that is less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_numbers(cgroup / "memory.max"), *_numbers(cgroup / "memory" / "memory.limit_in_bytes")])


def memory_budget_default(cgroup: Path = CGROUP) -> int:
    """Bytes that decoded images may take: a quarter of the memory."""
    return memory_limit(cgroup) // 4


def usable_cpus(cgroup: Path = CGROUP) -> int:
    """Processors this process may use, at least 1: its affinity and its container's quota, rounded up."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    v1 = [number for name in ("quota", "period") for number in _numbers(cgroup / "cpu" / f"cpu.cfs_{name}_us")]
    quota = _numbers(cgroup / "cpu.max") or v1  # microseconds per period, and the period; -1 or "max" is no quota
    return max(1, min(cpus, -(-quota[0] // quota[1])) if len(quota) == 2 and min(quota) > 0 else cpus)


def fresh_array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros in newly mapped pages: aligned for DLPack, and part of the process' memory only once written."""
    size = int(np.prod(shape)) * dtype.itemsize
    content = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            content.madvise(mmap.MADV_HUGEPAGE)  # faster: the first write to each 4 KB page costs more than its data
    return np.frombuffer(content, dtype).reshape(shape)
