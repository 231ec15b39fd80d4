"""glibc's allocator set to keep what it has: the environment of every child process that computes on a CPU.

By default glibc hands tensors over 32 MiB back at every free and faults every page in again at the next step; measured
up to a third of a step. The environment is read when a process starts, so only children can be given it.
"""

import os
from collections.abc import Mapping

ENVIRONMENT: Mapping[str, str] = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
}


def is_set() -> bool:
    """Say whether this process was started with it."""
    return all(os.environ.get(name) == value for name, value in ENVIRONMENT.items())
