"""Chooses the dispatcher that was measured best for a case and its load, and records the choice and its reason.

Per case, segments or grouped_mm by measurement; and padded wherever the experts are loaded so evenly that it is faster
still. Its time grows with the largest load, so it is predicted: that of even loads x largest load / mean load. Times
within 3 % of each other count as equal, and of equals the one that needs the least memory runs.

The choice is a pure function of device, dtype, shape, load and a file of measurements, so arms of a study on one
machine take the same path, and record it. On a CPU a case is measured when it is first met, once per machine, in
evaluation as in training. Without a measurement for a device and dtype a rule decides. Dispatchers that cannot run a
case are named in the record. The way of another package (`consider`) runs where it was measured to be more than 3 %
faster than ours, and by rule on a GPU if it is a grouped_mm.
"""

import logging
import math
import operator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.contracts.routing_plan import PairPlan
from lightning_moevlm.model.dispatch.auto.measure import measure_row
from lightning_moevlm.model.dispatch.auto.own_table import given_table, measure_once, own_file
from lightning_moevlm.model.dispatch.auto.timings_table import SHIPPED, Case, Row, Table, read_table, round_rows
from lightning_moevlm.model.dispatch.dispatcher import Dispatcher, matmul_dtype
from lightning_moevlm.model.dispatch.expert_protocol import Experts
from lightning_moevlm.model.dispatch.grouped_mm import GroupedDispatcher
from lightning_moevlm.model.dispatch.padded import PaddedDispatcher
from lightning_moevlm.model.dispatch.segments.segments import SegmentDispatcher

_log = logging.getLogger(__name__)
_SEGMENTS, _GROUPED, _PADDED = "SegmentDispatcher", "GroupedDispatcher", "PaddedDispatcher"
_MARGIN = 1.03  # times this close are within what repeated measurements differ by
_BOUNDED = 1.25  # largest load over the mean that is assumed under a capacity where loads are not read


class Choice(NamedTuple):
    """The choice for a case.

    name: class of the dispatcher for any load.
    padded_up_to: padded runs instead while the largest load over the mean load is at most this; 0 is never.
    why: measurement or rule, and dispatchers that cannot run it.
    """

    name: str
    padded_up_to: float
    why: str

    @property
    def text(self) -> str:
        """The choice without its reason."""
        even = f", {_PADDED} up to {self.padded_up_to:.2f} of the mean load" if self.padded_up_to else ""
        return f"{self.name}{even}"

    def at(self, skew: float) -> str:
        """Return the class that runs where the largest load is `skew` times the mean."""
        return _PADDED if skew <= self.padded_up_to else self.name


class AutoDispatcher(Dispatcher):
    """Runs the best dispatcher for each case and load: segments, grouped_mm or padded.

    Args:
        table: file of measurements, to which nothing is added; null takes the file in the environment variable
            MOEVLM_DISPATCH_TABLE, or this machine's own file, to which new cases are added.
    """

    def __init__(self, table: str | None = None) -> None:
        self.table = table
        if table is not None:
            read_table(Path(table))  # fail now, not in the first step
        self._choices: dict[Case, Choice] = {}
        self._ran: set[str] = set()
        each = (SegmentDispatcher(), GroupedDispatcher(), PaddedDispatcher())
        self._dispatchers: dict[str, Dispatcher] = {type(dispatcher).__name__: dispatcher for dispatcher in each}
        self._beside = ""

    def consider(self, name: str, other: Dispatcher) -> None:
        """Run the way of another package, which knows the experts too, where it was measured to be faster than ours."""
        self._dispatchers[name] = other
        self._beside = name

    def run_pairs(self, plan: PairPlan, tokens_TD: Tensor, experts: Experts) -> Tensor:
        """Return (T, D) in the tokens' dtype."""
        if torch.compiler.is_compiling():
            num_pairs = operator.index(plan.token_N.shape[0])  # a constant: another batch size is compiled anew
            case = make_case(num_pairs, plan, tokens_TD, experts, self._beside)
            name = self._name_for(self._refusals(tokens_TD, experts), _assumed_skew(plan), *case)
        else:
            name = self.choose(plan, tokens_TD, experts)
        return self._dispatchers[name].run_pairs(plan, tokens_TD, experts)

    def record(self) -> str:
        """Describe what runs each case seen so far, and why."""
        return "; ".join(f"{choice.name} for {case}: {choice.why}" for case, choice in self._choices.items())

    def choices(self) -> dict[str, str]:
        """Return what runs each case seen so far."""
        return {str(case): choice.text for case, choice in self._choices.items()}

    def in_use(self) -> tuple[str, ...]:
        """Return the dispatchers that have run so far."""
        return tuple(sorted(self._ran))

    def choose(self, plan: PairPlan, tokens_TD: Tensor, experts: Experts) -> str:
        """Return the class that runs such a plan; decided once per case, and logged then."""
        num_pairs, skew = _load(plan)
        case = make_case(num_pairs, plan, tokens_TD, experts, self._beside)
        if num_pairs and case not in self._choices and self._may_measure(case):
            self._decide(case, self._refusals(tokens_TD, experts), (plan, tokens_TD, experts))
        return self._name(self._refusals(tokens_TD, experts), skew, case)

    @torch.compiler.assume_constant_result
    def _name_for(self, refusals: tuple[str | None, ...], skew: float, *case: Any) -> str:
        """Choose while a graph is compiled: from constants alone, so the choice is one, too."""
        return self._name(refusals, skew, Case(*case))

    def _name(self, refusals: tuple[str | None, ...], skew: float, case: Case) -> str:
        if case not in self._choices:
            self._decide(case, refusals, None)
        name = self._choices[case].at(skew)
        self._ran.add(name)
        return name

    def _may_measure(self, case: Case) -> bool:
        return case.device == "cpu" and self.table is None and given_table() is None

    def _refusals(self, tokens_TD: Tensor, experts: Experts) -> tuple[str | None, ...]:
        return tuple(dispatcher.refusal(tokens_TD, experts) for dispatcher in self._dispatchers.values())

    def _decide(
        self, case: Case, refusals: tuple[str | None, ...], layer: tuple[PairPlan, Tensor, Experts] | None
    ) -> None:
        """Decide what runs a case. layer: what it is measured with, None where it must not be."""
        able = [name for name, refusal in zip(self._dispatchers, refusals, strict=True) if refusal is None]
        refused = [
            f"{name} passed over: {refusal}"
            for name, refusal in zip(self._dispatchers, refusals, strict=True)
            if refusal is not None
        ]
        table, note = self._measurements(case, able, layer)
        row = table.nearest(case)
        choice = _rule(case, able) if row is None else _fastest(case, row, able, table)
        why = "; ".join(filter(None, [choice.why, note, *refused]))
        self._choices[case] = choice._replace(why=why)
        _log.info("%s runs %s: %s", choice.name, case, why)

    def _measurements(
        self, case: Case, able: list[str], layer: tuple[PairPlan, Tensor, Experts] | None
    ) -> tuple[Table, str]:
        """Return the table to choose by, and a note on it."""
        given = Path(self.table) if self.table is not None else given_table()
        if given is not None:
            return read_table(given), ""
        if layer is not None:
            return measure_once(
                case, lambda: measure_row(case, *layer, {name: self._dispatchers[name] for name in able})
            )
        own = own_file()
        has_own = own.is_file() and read_table(own).nearest(case) is not None
        return read_table(own if has_own else SHIPPED), ""


def make_case(num_pairs: int, plan: PairPlan, tokens_TD: Tensor, experts: Experts, beside: str = "") -> Case:
    """Return the case of so many pairs; it depends on shapes alone. beside: see `Case`."""
    stacks = experts.stacks()
    return Case(
        device=tokens_TD.device.type,
        dtype=str(matmul_dtype(tokens_TD)).removeprefix("torch."),
        num_experts=plan.num_experts,
        rows=round_rows(num_pairs, plan.num_experts),
        dim=tokens_TD.shape[1],
        hidden_dim=stacks[0].shape[2],
        num_stacks=len(stacks),
        beside=beside,
    )


def _load(plan: PairPlan) -> tuple[int, float]:
    """Return how many pairs run, and the largest load over the mean; off the CPU neither is waited for."""
    if plan.token_N.device.type != "cpu":
        return plan.token_N.shape[0], _assumed_skew(plan)
    load_E = torch.bincount(plan.expert_N[plan.kept_N], minlength=plan.num_experts)
    num_pairs = int(load_E.sum())
    return num_pairs, int(load_E.max()) * plan.num_experts / num_pairs if num_pairs else math.inf


def _assumed_skew(plan: PairPlan) -> float:
    return _BOUNDED if plan.capacity_T is not None else math.inf


def _fastest(case: Case, row: Row, able: list[str], table: Table) -> Choice:
    """Choose by a measured row: the least memory among our times within the margin of the best, else the best."""
    times = {name: time for name, time in row.milliseconds.items() if name in able}
    unpadded = {name: time for name, time in times.items() if name != _PADDED}
    least = min(unpadded.values())
    near = (each for each in _by_memory(case) if unpadded.get(each, math.inf) <= _MARGIN * least)
    name = next(near, min(unpadded, key=unpadded.__getitem__))
    up_to = least / (_MARGIN * times[_PADDED]) if _PADDED in times else 0.0
    up_to = up_to if up_to >= 1 else 0.0
    even = f"{_PADDED} up to {up_to:.2f} of the mean load; " if up_to else ""
    frugal = "" if up_to or times[name] == min(times.values()) else f"least memory within {_MARGIN - 1:.0%}; "
    figures = ", ".join(f"{each} {times[each]:.3g} ms" for each in sorted(times, key=times.__getitem__))
    return Choice(name, up_to, f"{even}{frugal}measured at {row.case} ({figures}; {table.describe(row)})")


def _by_memory(case: Case) -> tuple[str, str]:
    """Return the dispatchers but padded, which never needs less, by their peak memory.

    Segments keep fewer activations of each row, and more for each expert. Measured peaks cross where an expert has as
    many rows as the tokens are wide: 0.6 to 0.95 of dense for 1.06 to 1.28 with more rows, 2.5 for 2.2 with fewer.
    """
    return (_SEGMENTS, _GROUPED) if case.rows >= case.dim else (_GROUPED, _SEGMENTS)


def _rule(case: Case, able: list[str]) -> Choice:
    """Choose for what was not measured."""
    start = f"no measurement for {case.device} in {case.dtype}, so by rule"
    if case.device != "cpu" and "grouped_mm" in case.beside:  # 1.20 times as fast as ours on an H200: bench/README.md
        order, up_to, why = [case.beside], 0.0, "it was faster on the GPU where it was measured"
    elif case.device == "cuda" and case.dtype == "bfloat16" and torch.cuda.get_device_capability() >= (9, 0):
        order, up_to, why = [_GROUPED, _SEGMENTS], 0.0, "grouped_mm has a kernel for it and waits for nothing"
    elif case.device != "cpu":  # grouped took 0.6 to 0.8 of the time of segments in fp32 on an H200
        order, up_to, why = [_GROUPED, _SEGMENTS], _BOUNDED, "one batched product where a capacity bounds the load"
    else:
        order, up_to, why = [_SEGMENTS, _GROUPED], 0.0, "runs everywhere"
    return Choice(next(name for name in order if name in able), up_to, f"{start}: {why}")
