"""The cores that this process may use, and how torch's threads wait on them, set before torch is loaded.

Torch computes on a team of OpenMP threads that meet after every loop. By default those that come first spin; beside
another program that wants the same cores, they spin in the time of the thread that they wait for. Measured with two
busy programs on two cores, ten steps of the quickstart took 18 s so, and 2 s with threads that sleep while they wait.
"""

import math
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

THREADS = "OMP_NUM_THREADS"
_WAIT_POLICY = "OMP_WAIT_POLICY"
_HOW_TO_WAIT = (_WAIT_POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # any of them is the user's word


def settle(env: MutableMapping[str, str], computes: bool) -> None:
    """Set in an environment, where the user has not, how threads wait and how many there are.

    Args:
        env: of this process, before torch is loaded.
        computes: this process trains or measures; else it starts others, which get a share of the cores each.
    """
    env.update(waiting(env))
    if computes and THREADS not in env and usable_cores() < _cores_by_affinity():
        env[THREADS] = str(usable_cores())  # OpenMP knows the affinity, and no quota


def waiting(env: Mapping[str, str]) -> dict[str, str]:
    """Return what lets threads sleep while they wait; nothing where the user has said how they do."""
    return {} if any(name in env for name in _HOW_TO_WAIT) else {_WAIT_POLICY: "PASSIVE"}


def usable_cores() -> int:
    """Return how many cores this process may use, by its affinity and by the quotas of the containers around it."""
    return min(_cores_by_affinity(), _cores_by_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))


def _cores_by_affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cores_by_quota(membership: Path, root: Path) -> int:
    """Return the whole cores, at least 1, that the smallest quota of the groups of a process comes to.

    Args:
        membership: one line per hierarchy, `number:controllers:/path`; the second version has no controllers.
        root: where the hierarchies are.
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
