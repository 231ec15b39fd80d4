"""The goals of the layer and of dispatch alone, and whether a run meets them. Fixed beforehand; a miss is reported.

A time goal is missed if both the best ratio and the median ratio miss it, because neither is worth more than 5 %.
"""

from collections.abc import Sequence
from typing import NamedTuple

from lightning_moevlm.bench.candidates import DENSE, GEMM, OURS
from lightning_moevlm.bench.dispatch_alone import Growth
from lightning_moevlm.bench.layer import LayerResult
from lightning_moevlm.bench.peers import TRANSFORMERS_EAGER, TRANSFORMERS_GROUPED
from lightning_moevlm.bench.step import StepTimes
from lightning_moevlm.bench.timing import Ratio, ratio

_TIME = {
    (DENSE, 8): 1.10,
    (DENSE, 16): 1.20,
    (GEMM, 32): 1.20,
    (GEMM, 64): 1.30,
    (TRANSFORMERS_GROUPED, 8): 0.92,
    (TRANSFORMERS_EAGER, 32): 0.20,
    (TRANSFORMERS_EAGER, 64): 0.06,
}
_NEVER_SLOWER = TRANSFORMERS_GROUPED
_PEAK_OVER_DENSE = 0.80
_ZIPF_OVER_BALANCED = 1.05
_DISPATCH_OVER_DENSE = 0.06
_LINEAR = 1.25  # time per token at T = 32768 over that at 2048
_EXPERTS = 2.0  # E = 128 over E = 4
_ADDED_MS = 2.5  # per step, by Lightning with all telemetry and MLflow, logging every 50
_SPARSE_OVER_DENSE = 1.03  # a whole training step


class Verdict(NamedTuple):
    """what: the goal in words. figure: what was measured. goal: at most this."""

    what: str
    figure: float
    goal: float

    @property
    def met(self) -> bool:
        """Whether the figure, rounded to what is shown, is within the goal."""
        return round(self.figure, 2) <= self.goal


def layer_verdicts(results: Sequence[LayerResult]) -> list[Verdict]:
    """Hold every result against the goals that concern it."""
    verdicts: list[Verdict] = []
    for result in results:
        shape, where = result.case.shape, f"{result.case.shape} {result.case.skew}"
        if result.case.skew == "balanced":
            for over in result.seconds:
                goal = _TIME.get((over, shape.E), 1.0 if over == _NEVER_SLOWER else None)
                if goal is not None:
                    fairest = ratio(result.seconds, OURS, over).fairest
                    verdicts.append(Verdict(f"time over {over}, {where}", fairest, goal))
            if shape.E == 8:
                peak = result.peaks[OURS] / result.peaks[DENSE]
                verdicts.append(Verdict(f"peak memory over dense, {where}", peak, _PEAK_OVER_DENSE))
        balanced = [each for each in results if each.case.shape == shape and each.case.skew == "balanced"]
        if result.case.skew == "zipf" and balanced:
            skewed, even = (ratio(each.seconds, OURS, DENSE) for each in (result, balanced[0]))
            over_balanced = min(skewed.best / even.best, skewed.median / even.median)
            verdicts.append(Verdict(f"zipf over balanced, {shape}", over_balanced, _ZIPF_OVER_BALANCED))
    return verdicts


def dispatch_verdicts(growth: Growth) -> list[Verdict]:
    """Hold dispatch alone against its goals."""
    return [
        Verdict("dispatch alone over the dense FFN, T=2048 E=8", growth.over_dense, _DISPATCH_OVER_DENSE),
        Verdict("time per token, T=32768 over T=2048", growth.tokens_ratio, _LINEAR),
        Verdict("time, E=128 over E=4", growth.experts_ratio, _EXPERTS),
    ]


def step_verdicts(times: StepTimes, sparsity: Ratio) -> list[Verdict]:
    """Hold whole steps against their goals."""
    return [
        Verdict("ms that Lightning, telemetry and MLflow add to a step", min(times.added), _ADDED_MS),
        Verdict("sparse step over dense step", sparsity.fairest, _SPARSE_OVER_DENSE),
    ]
