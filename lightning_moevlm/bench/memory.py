"""Exact peak of torch's own allocations during a step, above what was there when it began: no noise at all."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_mib(step: Callable[[], object], release: Callable[[], None], device: str = "cpu") -> float:
    """Return the peak in MiB of a step that starts without gradients.

    Args:
        step: forward and backward.
        release: frees what a former step left, so that the peak is above the weights alone.
        device: whose memory is meant.
    """
    step()
    release()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        step()
    assert trace.profiler is not None and trace.profiler.kineto_results is not None
    events = trace.profiler.kineto_results.events()
    now, peak = 0, 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        now += size
        peak = max(peak, now)
    return peak / 2**20
