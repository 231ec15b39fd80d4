"""Every expert gets a buffer of equal length, and all of them one batched matrix product: (E, C, D) x (E, D, F).

C is the largest load, read on the host, or fixed by `factor`: then shapes are static and the host does not wait. Time
and memory go with E x C, so it is meant for loads that a capacity bounds; a skewed dropless plan pays for its skew in
padding. Pairs that would not fit a fixed C are an error, never dropped: dropping is what `Capacity` is for.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.routing_plan import PairPlan
from lightning_moevlm.model.dispatch.capacity import Capacity, list_factors
from lightning_moevlm.model.dispatch.capacity_rule import ByDropRate
from lightning_moevlm.model.dispatch.dispatcher import Dispatcher, matmul_dtype
from lightning_moevlm.model.dispatch.expert_protocol import Experts
from lightning_moevlm.model.dispatch.segments.compiled_products import run_in_graph
from lightning_moevlm.model.dispatch.sorted_pairs import SortedPairs, combine, gather_rows, sort_by_expert


class PaddedDispatcher(Dispatcher):
    """Batched matrix products over padded buffers.

    Args:
        factor: C = ceil(factor x N / E) for N pairs, padding and unused pairs included; not below the capacity's
            factors. null reads the largest load on the host, one wait for the device per layer.
    """

    def __init__(self, factor: float | None = None) -> None:
        if factor is not None:
            check_number("factor", factor, above=0, advice=", e.g. the capacity's own factor, or null")
        self.factor = factor

    def check(self, capacity: Capacity | None) -> None:
        """Refuse fewer places than the capacity may fill; without a capacity any factor is accepted."""
        if capacity is None or self.factor is None:
            return
        if isinstance(capacity.train_factor, ByDropRate):
            raise UserError(
                f"dispatcher.factor is {self.factor}, but capacity.train_factor follows the drop rate without an upper "
                "limit: set dispatcher.factor to null"
            )
        if capacity.train_factor is not None and capacity.eval_factor is None:
            raise UserError(
                f"dispatcher.factor is {self.factor}, but capacity.eval_factor is null: in dropless evaluation an "
                "expert may get more tokens than PaddedDispatcher has buffer rows for: set dispatcher.factor to null, "
                f"or capacity.eval_factor to at most {self.factor}"
            )
        for name in ("train_factor", "eval_factor"):
            factors = list_factors(getattr(capacity, name))
            largest = max((factor for factor in factors if factor is not None), default=0.0)
            if self.factor < largest:
                raise UserError(
                    f"dispatcher.factor is {self.factor} and capacity.{name} {largest}: an expert may get more tokens "
                    "than PaddedDispatcher has buffer rows for: set dispatcher.factor to at least "
                    f"{largest}, or to null"
                )

    def run_pairs(self, plan: PairPlan, tokens_TD: Tensor, experts: Experts) -> Tensor:
        """Return (T, D) in the tokens' dtype."""
        dtype = matmul_dtype(tokens_TD)
        stacks = tuple(stack.to(dtype) for stack in experts.stacks())
        if torch.compiler.is_compiling() and self.factor is None:
            return run_in_graph(plan, tokens_TD, experts, stacks, "padded")
        pairs = sort_by_expert(plan, wait=False)
        load_E = pairs.end_E.diff(prepend=pairs.end_E.new_zeros(1))
        places = self._places(plan, load_E)
        slot_M, row_S = _slots(plan, pairs, pairs.end_E - load_E, places)

        def batched(rows: Tensor, weight: Tensor, /) -> Tensor:
            product = torch.bmm(rows.to(weight.dtype).reshape(plan.num_experts, places, rows.shape[1]), weight)
            return product.view(plan.num_experts * places, weight.shape[2])

        rows_SD = _Rearrange.apply(gather_rows(tokens_TD.to(dtype), pairs), row_S, slot_M)
        rows_MD = _Rearrange.apply(experts.run(rows_SD, stacks, batched), slot_M, row_S)
        return combine(rows_MD, torch.where(plan.kept_N, plan.weight_N, 0.0), pairs, tokens_TD.dtype)

    def _places(self, plan: PairPlan, load_E: Tensor) -> int:
        if self.factor is None:
            return int(load_E.max())
        # a little slack: 1.2 * 25 / 3 is 10, not the 11 that rounding errors make of it
        places = math.ceil(self.factor * plan.token_N.shape[0] / plan.num_experts - 1e-9)
        largest = load_E.max()
        if load_E.device.type != "cpu" or torch.compiler.is_compiling():
            torch._assert_async(
                largest <= places, f"an expert has more than the {places} buffer rows of PaddedDispatcher"
            )
        elif int(largest) > places:
            raise UserError(
                f"an expert has {int(largest)} tokens and PaddedDispatcher {places} buffer rows per expert: set "
                f"dispatcher.factor (now {self.factor}) to at least the capacity's factor, or to null"
            )
        return places


def _slots(plan: PairPlan, pairs: SortedPairs, start_E: Tensor, places: int) -> tuple[Tensor, Tensor]:
    """Return each row's slot and each slot's row; a row or slot without one points behind the last."""
    num_rows, num_slots = pairs.pair_M.shape[0], plan.num_experts * places
    expert_M = plan.expert_N[pairs.pair_M]
    row_M = torch.arange(num_rows, device=expert_M.device)
    slot_M = expert_M * places + row_M - start_E[expert_M]
    slot_M = torch.where(plan.kept_N[pairs.pair_M], slot_M, num_slots)
    row_S = torch.full((num_slots + 1,), num_rows, device=expert_M.device).scatter_(0, slot_M, row_M)[:-1]
    return slot_M, row_S


class _Rearrange(torch.autograd.Function):
    """Gather rows, with a row of zeros behind the last; the gradient is the gather that undoes it."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.back = back  # type: ignore[attr-defined]
        return _gather_padded(rows, there)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _gather_padded(gradient, ctx.back), None, None  # type: ignore[attr-defined]


def _gather_padded(rows: Tensor, index: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])]).index_select(0, index)
