"""Pick the dispatcher that was measured best for a case, and say which one ran and why.

The best is the fastest; of those within 5 % of it, which no measurement can tell apart, the one of least memory.

The choice is a pure function of device, dtype, shape and the table, never of the data or the clock, so arms of a study
on one machine take the same path, and their records say which. Without a measurement for a device and dtype a rule
decides. A dispatcher that cannot run a case is passed over by name: nothing falls back in silence.
"""

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.contracts.routing_plan import PairPlan
from lightning_moevlm.model.dispatch.auto.timings_table import Case, measurements, rounded_rows
from lightning_moevlm.model.dispatch.dispatcher import Dispatcher, matmul_dtype
from lightning_moevlm.model.dispatch.expert_protocol import Experts
from lightning_moevlm.model.dispatch.grouped_mm import GroupedDispatcher
from lightning_moevlm.model.dispatch.padded import PaddedDispatcher
from lightning_moevlm.model.dispatch.segments.segments import SegmentDispatcher

_log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """name: class of the dispatcher that runs. why: measurement or rule, and who was passed over for what reason."""

    name: str
    why: str


class AutoDispatcher(Dispatcher):
    """Runs the best dispatcher for each case: segments, grouped_mm, or padded where a capacity bounds the load.

    Args:
        table: file of measurements; null takes the one that `moevlm bench dispatch` wrote on this machine, then the one
            that the package ships.
    """

    def __init__(self, table: str | None = None) -> None:
        self.table = table
        if table is not None:
            measurements(table)  # a mistake in the path is told now, not in the first step
        self._choices: dict[Case, Choice] = {}
        each = (SegmentDispatcher(), GroupedDispatcher(), PaddedDispatcher())
        self._dispatchers: dict[str, Dispatcher] = {type(dispatcher).__name__: dispatcher for dispatcher in each}

    def run_pairs(self, plan: PairPlan, tokens_TD: Tensor, experts: Experts) -> Tensor:
        """Return (T, D) in the tokens' dtype."""
        if torch.compiler.is_compiling():
            name = self._name_for(self._refusals(tokens_TD, experts), *case_of(plan, tokens_TD, experts))
        else:
            name = self.choose(plan, tokens_TD, experts).name
        return self._dispatchers[name].run_pairs(plan, tokens_TD, experts)

    def record(self) -> str:
        """Say what has run so far and why, for the record of a run."""
        told = dict.fromkeys(f"{choice.name} for {case}: {choice.why}" for case, choice in self._choices.items())
        return "; ".join(told)

    def in_use(self) -> tuple[str, ...]:
        """Return the dispatchers chosen so far."""
        return tuple(sorted({choice.name for choice in self._choices.values()}))

    def choose(self, plan: PairPlan, tokens_TD: Tensor, experts: Experts) -> Choice:
        """Return the choice for such a plan; made once per case, and logged then."""
        return self._choice(case_of(plan, tokens_TD, experts), self._refusals(tokens_TD, experts))

    def _choice(self, case: Case, refusals: tuple[str | None, ...]) -> Choice:
        if case not in self._choices:
            self._choices[case] = self._decide(case, refusals)
            _log.info("%s runs %s: %s", self._choices[case].name, case, self._choices[case].why)
        return self._choices[case]

    @torch.compiler.assume_constant_result
    def _name_for(self, refusals: tuple[str | None, ...], *case: Any) -> str:
        """Choose while a graph is compiled: from constants alone, so the choice is one, too."""
        return self._choice(Case(*case), refusals).name

    def _refusals(self, tokens_TD: Tensor, experts: Experts) -> tuple[str | None, ...]:
        return tuple(dispatcher.refusal(tokens_TD, experts) for dispatcher in self._dispatchers.values())

    def _decide(self, case: Case, refusals: tuple[str | None, ...]) -> Choice:
        able: list[str] = []
        refused: list[str] = []
        for name, refusal in zip(self._dispatchers, refusals, strict=True):
            if refusal is None and name == "PaddedDispatcher" and not case.bounded:
                refusal = "no capacity bounds the load"
            if refusal is None:
                able.append(name)
            else:
                refused.append(f"{name} passed over: {refusal}")
        ranked, why = self._ranked(case, able)
        return Choice(ranked[0], "; ".join([why, *refused]))

    def _ranked(self, case: Case, able: list[str]) -> tuple[list[str], str]:
        """Return the dispatchers that can run the case, best first, and the reason for the order."""
        for table in measurements(self.table):
            row = table.nearest(case)
            if row is not None and (ranked := row.ranked(able)):
                return ranked, f"measured at {row.case} ({row.told(able)}; table {table.digest})"
        order, why = _rule(case)
        return [name for name in order if name in able], why


def case_of(plan: PairPlan, tokens_TD: Tensor, experts: Experts) -> Case:
    """Return the case of a plan; it depends on shapes alone."""
    stacks = experts.stacks()
    return Case(
        device=tokens_TD.device.type,
        dtype=str(matmul_dtype(tokens_TD)).removeprefix("torch."),
        num_experts=plan.num_experts,
        rows=rounded_rows(plan.token_N.shape[0], plan.num_experts),
        dim=tokens_TD.shape[1],
        hidden_dim=stacks[0].shape[2],
        bounded=plan.capacity_T is not None,
    )


def _rule(case: Case) -> tuple[list[str], str]:
    """Return an order for what was not measured."""
    segments, grouped, padded = "SegmentDispatcher", "GroupedDispatcher", "PaddedDispatcher"
    start = f"no measurement for {case.device} in {case.dtype}, so by rule"
    if case.device == "cuda" and case.dtype == "bfloat16" and torch.cuda.get_device_capability() >= (9, 0):
        return [grouped, segments, padded], f"{start}: grouped_mm has a kernel for it and waits for nothing"
    if case.device != "cpu" and case.bounded:
        return [padded, segments, grouped], f"{start}: one batched product, as the load is bounded"
    return [segments, grouped, padded], f"{start}: runs everywhere"
