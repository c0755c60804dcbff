"""Determine the memory and CPUs that this process can use in its container (cgroup), and allocate aligned arrays."""

import contextlib
import mmap
import os
from pathlib import Path

import numpy as np

CGROUP = Path("/sys/fs/cgroup")  # mount point of the control groups, version 1 or 2


def _read_integers(file: Path) -> list[int]:
    """Return the space-separated integers in a file, or [] if it has other content or cannot be read."""
    try:
        return [int(word) for word in file.read_text().split()]
    except (OSError, ValueError):  # the file is missing, or contains "max"
        return []


def get_memory_limit_bytes(cgroup: Path = CGROUP) -> int:
    """Return the machine's memory in bytes, or the container's limit (cgroup v2 or v1) if the limit is lower."""
    machine_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit_v2, limit_v1 = (_read_integers(cgroup / name) for name in ("memory.max", "memory/memory.limit_in_bytes"))
    return min([machine_bytes, *limit_v2, *limit_v1])


def get_default_memory_budget(cgroup: Path = CGROUP) -> int:
    """Return the memory budget in bytes for runtime.memory_budget_gb=null, which is a quarter of the memory limit."""
    return get_memory_limit_bytes(cgroup) // 4


def count_usable_cpus(cgroup: Path = CGROUP) -> int:
    """Return the number of CPUs on which this process can run, or its container's quota (rounded up) if lower."""
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cfs_v1 = [value for name in ("quota", "period") for value in _read_integers(cgroup / "cpu" / f"cpu.cfs_{name}_us")]
    cfs = _read_integers(cgroup / "cpu.max") or cfs_v1  # quota and period in microseconds; "max" or -1 is no quota
    return max(1, min(num_cpus, -(-cfs[0] // cfs[1])) if len(cfs) == 2 and min(cfs) > 0 else num_cpus)


def allocate_array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocate an array of zeros, aligned to memory pages for DLPack. A page takes no memory until it is written."""
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)  # fewer page faults: one per 4 KB page costs more than writing its data
    return np.frombuffer(pages, dtype).reshape(shape)
