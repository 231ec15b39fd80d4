"""glibc's allocator set to keep what it has, for every process that computes on a CPU.

By default glibc hands tensors over 32 MiB back at every free and faults every page in again at the next step; measured
up to a third of a step. A process sets itself by `mallopt`; a child that it starts is given the environment.
"""

import ctypes
import os
import platform
from collections.abc import Mapping

ENVIRONMENT: Mapping[str, str] = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST = 2**31 - 1


def is_set() -> bool:
    """Say whether this process was started with it."""
    return all(os.environ.get(name) == value for name, value in ENVIRONMENT.items())


def keep_memory() -> bool:
    """Let this process keep its memory; return whether it does. What the user has set of it stays, as it is."""
    if any(name in os.environ for name in ENVIRONMENT):
        return is_set()
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # blocks below 2 GiB come from the heap, and -1 never hands its top back
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
