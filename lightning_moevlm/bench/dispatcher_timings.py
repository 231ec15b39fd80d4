"""Measures the dispatchers over a grid of cases, so that trainings need not."""

import torch

from lightning_moevlm.bench.candidates import Layer
from lightning_moevlm.bench.cases import Case as LayerCase
from lightning_moevlm.bench.cases import Shape, make_tokens
from lightning_moevlm.contracts.routing_plan import RoutingInput
from lightning_moevlm.model.dispatch import (
    AutoDispatcher,
    Dispatcher,
    GroupedDispatcher,
    PaddedDispatcher,
    SegmentDispatcher,
)
from lightning_moevlm.model.dispatch.auto.measure import measure_row
from lightning_moevlm.model.dispatch.auto.timings_table import Case, Row

_EXPERTS = (8, 32)
_ROWS = (32, 128, 512)
_WIDTHS = ((64, 256), (256, 1024))
_STACKS = (2, 3)


def grid() -> list[Case]:
    """Return the cases of the table."""
    return [
        Case("cpu", "float32", num_experts, rows, dim, hidden_dim, num_stacks)
        for num_experts in _EXPERTS
        for rows in _ROWS
        for dim, hidden_dim in _WIDTHS
        for num_stacks in _STACKS
    ]


def measure_case(case: Case, rounds: int) -> Row:
    """Time every dispatcher on a top-2 layer of such a case."""
    shape = Shape(
        case.num_experts * case.rows // 2,
        case.dim,
        case.hidden_dim,
        case.num_experts,
        act="gelu" if case.num_stacks == 2 else "swiglu",
    )
    layer_case = LayerCase(shape, "balanced")
    tokens = make_tokens(layer_case)
    layer = Layer(layer_case, tokens, AutoDispatcher())
    valid_T = torch.ones(shape.T, dtype=torch.bool)
    plan = layer.router(RoutingInput(tokens.tokens_TD, torch.zeros(shape.T, dtype=torch.int64), valid_T))
    each: tuple[Dispatcher, ...] = (SegmentDispatcher(), GroupedDispatcher(), PaddedDispatcher())
    by_name = {type(dispatcher).__name__: dispatcher for dispatcher in each}
    return measure_row(case, plan, tokens.tokens_TD, layer.experts, by_name, rounds)
