"""Goals of the benchmarks, set beforehand, and the verdicts of a run on them.

A time goal is missed if both the best ratio and the median ratio miss it, because each is accurate to about 5 %.
"""

from collections.abc import Sequence
from typing import NamedTuple

from lightning_moevlm.bench.adopted import BACKENDS, AdoptedTimes
from lightning_moevlm.bench.busy_machine import MOEVLM_WAIT, LoadTimes
from lightning_moevlm.bench.candidates import DENSE, GEMM, OURS
from lightning_moevlm.bench.data.data_loading import CEILING, FED, FIXED, LOADER, PLAIN, DataTimes, name_timed
from lightning_moevlm.bench.dispatch_scaling import Growth
from lightning_moevlm.bench.layer import LayerResult
from lightning_moevlm.bench.peers import TRANSFORMERS_EAGER, TRANSFORMERS_GROUPED
from lightning_moevlm.bench.timing import Ratio, ratio
from lightning_moevlm.bench.training_step import StepTimes

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
_OBSERVED_OVER_PLAIN = 1.02
_ADDED_OVER_PLANS = 1.02  # peak memory; beside plans, mask and modality of each token, once for all layers
_SPARSE_OVER_DENSE = 1.03  # a whole training step
_OVER_FAIR_SHARE = 1.2  # time of a step, quiet and beside busy processes
_OF_CEILING = {64: 0.60, 224: 0.75}  # samples/s of the loader over decoding alone, by image size
_OF_CEILING_BEYOND = 0.85
_OVER_PLAIN = 2.0  # samples/s over WebDataset with Pillow
_FED = 0.95  # of a consumer's rate on a fixed batch


class Verdict(NamedTuple):
    """A goal and its figure.

    what: text of the goal.
    figure: measured value.
    goal: upper bound, or lower bound with at_least.
    """

    what: str
    figure: float
    goal: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """True if the figure, rounded as it is shown, is within the goal."""
        shown = round(self.figure, 2)
        return shown >= self.goal if self.at_least else shown <= self.goal


def layer_verdicts(results: Sequence[LayerResult]) -> list[Verdict]:
    """Check every result against its goals."""
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
    """Check dispatch alone against its goals."""
    return [
        Verdict("dispatch alone over the dense FFN, T=2048 E=8", growth.over_dense, _DISPATCH_OVER_DENSE),
        Verdict("time per token, T=32768 over T=2048", growth.tokens_ratio, _LINEAR),
        Verdict("time, E=128 over E=4", growth.experts_ratio, _EXPERTS),
    ]


def step_verdicts(times: StepTimes, sparsity: Ratio) -> list[Verdict]:
    """Check whole steps against their goals."""
    return [
        Verdict("ms that Lightning, telemetry and MLflow add to a step", times.added, _ADDED_MS),
        Verdict("sparse step over dense step", sparsity.fairest, _SPARSE_OVER_DENSE),
    ]


def observing_verdicts(times: AdoptedTimes) -> list[Verdict]:
    """Check what observing a model of Hugging Face costs, by each back-end."""
    verdicts = []
    for backend in BACKENDS:
        time, memory = times.over_plain(backend).fairest, times.added_mib(backend) / times.plans
        verdicts += [
            Verdict(f"observed step over the plain model's, {backend}", time, _OBSERVED_OVER_PLAIN),
            Verdict(f"memory that observing adds over that of its plans, {backend}", memory, _ADDED_OVER_PLANS),
        ]
    return verdicts


def load_verdicts(times: LoadTimes) -> list[Verdict]:
    """Check a step, quiet and beside busy processes, against its goal."""
    return [
        Verdict(f"time over fair share, {name}", times.over_fair_share(name), _OVER_FAIR_SHARE)
        for name in times.seconds
        if name.startswith(MOEVLM_WAIT)
    ]


def data_verdicts(times: DataTimes, sizes: Sequence[int], num_workers: Sequence[int]) -> list[Verdict]:
    """Check the loader against its goals; that of the fixed batch with the best number of workers."""
    verdicts: list[Verdict] = []
    for size in sizes:
        for workers in num_workers:
            ours, where = name_timed(LOADER, size, workers), f"{size} px, {workers} workers"
            share = times.share(ours, name_timed(CEILING, size, workers))
            if size in _OF_CEILING:
                verdicts.append(Verdict(f"share of decoding alone, {where}", share, _OF_CEILING[size], at_least=True))
            verdicts.append(Verdict(f"the same, goal beyond, {where}", share, _OF_CEILING_BEYOND, at_least=True))
            over = times.share(ours, name_timed(PLAIN, size, workers))
            verdicts.append(Verdict(f"samples/s over {PLAIN}, {where}", over, _OVER_PLAIN, at_least=True))
    fed = max(times.share(name_timed(FED, sizes[0], workers), FIXED) for workers in num_workers)
    verdicts.append(Verdict(f"consumer fed, over a fixed batch, {sizes[0]} px", fed, _FED, at_least=True))
    return verdicts
