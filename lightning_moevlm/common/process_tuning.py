"""Tunes a process that computes on a CPU: glibc's allocator, Python's garbage collector, threads.

By default glibc returns tensors over 32 MiB to the system at every free and faults every page in again at the next
step, up to a third of a step. A process sets its own allocator by `mallopt`, and its children's by the environment.
"""

import atexit
import ctypes
import gc
import math
import os
import platform
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path

ENVIRONMENT: Mapping[str, str] = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST = 2**31 - 1
_NORMAL_COLLECTION, _RARE_COLLECTION = gc.get_threshold(), (100_000, 50, 100)
THREADS = "OMP_NUM_THREADS"
_WAIT: Mapping[str, str] = {
    "OMP_WAIT_POLICY": "PASSIVE",
    # GNU OpenMP spins shortly before a thread sleeps. A step of many small operations took 1.3 times as long without it
    # on a quiet machine, and 2.3 times as long beside busy processes with the default of 3 ms (bench step --beside 2).
    "GOMP_SPINCOUNT": "500",
}
_WAIT_OPTIONS = (*_WAIT, "KMP_BLOCKTIME")  # the user may have set any of them


def has_allocator_settings() -> bool:
    """Return whether this process was started with `ENVIRONMENT`."""
    return all(os.environ.get(name) == value for name, value in ENVIRONMENT.items())


def keep_memory() -> bool:
    """Let this process keep its memory, unless the user has set it otherwise; return whether it does."""
    if any(name in os.environ for name in ENVIRONMENT):
        return has_allocator_settings()
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # blocks below 2 GiB come from the heap, and -1 never hands its top back
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


@contextmanager
def collect_rarely() -> Iterator[None]:
    """Collect rarely within, and not when the process ends: that takes seconds, and the system frees all memory."""
    atexit.register(gc.freeze)
    gc.set_threshold(*_RARE_COLLECTION)
    try:
        yield
    finally:
        gc.set_threshold(*_NORMAL_COLLECTION)


def collect_normally() -> None:
    """Collect as often as Python does from here on, except objects that exist already."""
    gc.freeze()
    gc.set_threshold(*_NORMAL_COLLECTION)


def set_thread_defaults(env: MutableMapping[str, str], computes: bool) -> None:
    """Set in an environment, where the user has not, how threads wait and how many there are.

    Args:
        env: of this process, before torch is loaded.
        computes: this process trains or measures. Else it starts others, each with a share of the cores.
    """
    env.update(wait_policy(env))
    if computes and THREADS not in env and count_usable_cores() < _cores_by_affinity():
        env[THREADS] = str(count_usable_cores())  # OpenMP knows the affinity, but no quota


def wait_policy(env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that let threads sleep soon while they wait; none where the user has set one."""
    return {} if any(name in env for name in _WAIT_OPTIONS) else dict(_WAIT)


def count_usable_cores() -> int:
    """Return the number of cores of this process, by its affinity and the quotas of the containers around it."""
    return min(_cores_by_affinity(), _cores_by_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))


def _cores_by_affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cores_by_quota(membership: Path, root: Path) -> int:
    """Return the smallest quota of a process's control groups in whole cores, at least 1.

    Args:
        membership: one line per hierarchy, `number:controllers:/path`; version 2 has no controllers.
        root: the folder of the hierarchies.
    """
    cores = math.inf
    for line in _text(membership).splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        folder = top / path.strip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(top):
                break
            cores = min(cores, _quota(group))
    return max(1, math.ceil(cores)) if cores < math.inf else 2**31


def _quota(group: Path) -> float:
    quota, period = _text(group / "cpu.max").split() or ["", ""]
    if not quota:
        quota, period = (_text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else math.inf  # "max", or -1: no limit


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""
