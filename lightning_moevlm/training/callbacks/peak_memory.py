"""Reads the peak memory of training so far, as counted by the device or the operating system.

On CUDA it is the peak of tensors on this rank's device since training began, by torch's allocator. Elsewhere it is the
largest resident set of this rank's process since its start, libraries included.
"""

import resource
import sys

import torch

from lightning_moevlm.contracts import metric_keys

_MIB = 2**20
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes; getrusage counts bytes on macOS, KiB on Linux


def reset_peak(device: torch.device) -> None:
    """Reset the peak on CUDA; elsewhere it cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return the peak in MiB, under the key of its kind."""
    if device.type == "cuda":
        return {metric_keys.PEAK_DEVICE_MEMORY.key(): torch.cuda.max_memory_allocated(device) / _MIB}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
    return {metric_keys.PEAK_PROCESS_MEMORY.key(): peak / _MIB}
