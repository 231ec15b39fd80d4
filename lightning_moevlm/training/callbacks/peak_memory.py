"""The most memory that training has held so far, as device or operating system count it: nothing is sampled.

On CUDA it is what tensors held at most on this rank's device since training began, as torch's allocator counts;
elsewhere the largest resident set of this rank's process since it started, libraries included.
"""

import resource
import sys

import torch

from lightning_moevlm.contracts import metric_keys

_MIB = 2**20
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes; getrusage counts bytes on macOS, KiB on Linux


def forget_peak(device: torch.device) -> None:
    """Begin to count anew where that is possible: on CUDA."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return the peak in MiB, under the key that says what was counted."""
    if device.type == "cuda":
        return {metric_keys.PEAK_DEVICE_MEMORY.key(): torch.cuda.max_memory_allocated(device) / _MIB}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
    return {metric_keys.PEAK_PROCESS_MEMORY.key(): peak / _MIB}
