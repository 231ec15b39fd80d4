"""Times candidates fairly on a busy machine: interleaved, in random order each round, compared by ratios.

best ratio: ratio of the second-smallest times. median ratio: median over rounds of the ratio within a round, so that a
slow spell affects both. Each is accurate to about 5 %. With one thread and no GPU a step is timed by the CPU time of
the process, which other processes do not change; with more by the wall clock, because threads wait.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from lightning_moevlm.bench.candidates import Candidate

Seconds = Mapping[str, Sequence[float]]
"""Times by candidate, one per round, rounds in the same order for all."""


class Ratio(NamedTuple):
    """Two estimates of the ratio of two times."""

    best: float
    median: float

    @property
    def fairest(self) -> float:
        """The smaller of the two: a goal is missed only if both miss it."""
        return min(self.best, self.median)


def interleave(candidates: Sequence[Candidate], rounds: int, tick: Callable[[], None]) -> dict[str, list[float]]:
    """Time every candidate once per round after one untimed call each; tick after each call."""
    order = random.Random(0)
    seconds: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for candidate in candidates:
        _time_step(candidate)
        tick()
    for _ in range(rounds):
        for candidate in order.sample(list(candidates), len(candidates)):
            seconds[candidate.name].append(_time_step(candidate))
            tick()
    return seconds


def ratio(seconds: Seconds, name: str, over: str) -> Ratio:
    """Return the time of `name` over that of `over`."""
    in_round = [mine / theirs for mine, theirs in zip(seconds[name], seconds[over], strict=True)]
    return Ratio(best(seconds[name]) / best(seconds[over]), statistics.median(in_round))


def best(times: Sequence[float]) -> float:
    """Return the second-smallest time: the smallest may be a fluke."""
    return sorted(times)[min(1, len(times) - 1)]


def wall_clock() -> bool:
    """Say whether steps are timed by the wall clock."""
    return torch.cuda.is_available() or torch.get_num_threads() > 1


def _time_step(candidate: Candidate) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    clock = time.perf_counter if wall_clock() else time.process_time
    start = clock()
    candidate.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def peak_mib(step: Callable[[], object], release: Callable[[], None], device: str = "cpu") -> float:
    """Return the peak in MiB of a step that starts without gradients.

    Args:
        step: forward and backward.
        release: frees the gradients of a former step, so that the peak excludes the weights alone.
        device: device of the memory.
    """
    step()
    release()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]  # the allocator rounds up, differently
        step()
        return (torch.cuda.memory_stats()["requested_bytes.all.peak"] - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        step()
    assert trace.profiler is not None and trace.profiler.kineto_results is not None
    events = trace.profiler.kineto_results.events()
    now, peak = 0, 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        now += size
        peak = max(peak, now)
    return peak / 2**20
