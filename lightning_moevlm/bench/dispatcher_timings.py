"""Measure the dispatchers over a grid of cases: the table that `AutoDispatcher` chooses by."""

import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lightning_moevlm.bench.candidates import Layer, training
from lightning_moevlm.bench.cases import Case as LayerCase
from lightning_moevlm.bench.cases import Shape, make_tokens
from lightning_moevlm.bench.timing import best, interleave, peak_mib, wall_clock
from lightning_moevlm.contracts.routing_plan import PairPlan
from lightning_moevlm.model.dispatch import (
    Capacity,
    Dispatcher,
    Experts,
    GroupedDispatcher,
    PaddedDispatcher,
    SegmentDispatcher,
    apply_capacity,
)
from lightning_moevlm.model.dispatch.auto.timings_table import Case, Row

_EXPERTS = (8, 32)
_ROWS = (32, 128, 512)
_WIDTHS = ((64, 256), (256, 1024))
_BOUND = Capacity(train_factor=1.25)


def grid() -> list[Case]:
    """Return the cases of the table."""
    return [
        Case("cpu", "float32", num_experts, rows, dim, hidden_dim, bounded)
        for num_experts in _EXPERTS
        for rows in _ROWS
        for dim, hidden_dim in _WIDTHS
        for bounded in (False, True)
    ]


def measure_row(case: Case, rounds: int, tick: Callable[[], None]) -> Row:
    """Time every dispatcher on a case; its load is Zipf's, cut by a capacity of 1.25 where it is bounded."""
    shape = Shape(case.num_experts * case.rows // 2, case.dim, case.hidden_dim, case.num_experts, act="gelu")
    layer_case = LayerCase(shape, "zipf" if case.bounded else "balanced")
    tokens = make_tokens(layer_case)
    each: tuple[Dispatcher, ...] = (SegmentDispatcher(), GroupedDispatcher(), PaddedDispatcher())
    candidates = [
        training(type(dispatcher).__name__, Layer(layer_case, tokens, _Bound(dispatcher, case.bounded)), tokens)
        for dispatcher in each
    ]
    peaks = {each.name: round(peak_mib(each.step, each.release), 2) for each in candidates if each.release is not None}
    seconds = interleave(candidates, rounds, tick)
    return Row(case, {name: round(1e3 * best(times), 4) for name, times in seconds.items()}, peaks)


def provenance(command: str) -> dict[str, str]:
    """Say where a table comes from."""
    return {
        "torch": torch.__version__,
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "clock": "wall" if wall_clock() else "CPU time of the process",
        "date": time.strftime("%Y-%m-%d"),
        "command": command,
    }


class _Bound(Dispatcher):
    """A dispatcher behind a capacity."""

    def __init__(self, inner: Dispatcher, bounded: bool) -> None:
        self.inner, self.bounded = inner, bounded

    def run_pairs(self, plan: PairPlan, tokens_TD: torch.Tensor, experts: Experts) -> torch.Tensor:
        return self.inner.run_pairs(
            apply_capacity(plan, _BOUND, training=True) if self.bounded else plan, tokens_TD, experts
        )


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
