"""Sorts pairs by expert, to run them, and by token, to sum them (a bag of rows per token).

Both ways are gathers, forward and backward: a token's rows are read where they lie and summed, in plan order, so equal
plans give equal sums on every device, and nothing is added into place by index.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from lightning_moevlm.contracts.routing_plan import PairPlan


class SortedPairs(NamedTuple):
    """M rows sorted by expert, and the way back to tokens.

    pair_M: int64, pair of the plan of each row.
    token_M: int64, token of each row.
    end_E: int64, the row behind each expert's last one.
    bag_M: int64, rows ordered by token.
    pair_of_bag_M: int64, pair of the plan of each row of bag_M.
    offset_T: int64, start of each token's bag in bag_M.
    lengths: kept pairs per expert, on the host, and the rows are the kept pairs; None: the rows are all N pairs, those
        not kept last.
    """

    pair_M: Tensor
    token_M: Tensor
    end_E: Tensor
    bag_M: Tensor
    pair_of_bag_M: Tensor
    offset_T: Tensor
    lengths: list[int] | None


def sort_by_expert(plan: PairPlan, *, wait: bool) -> SortedPairs:
    """Sort stably, so that equal plans give equal sums.

    Args:
        plan: plan to sort.
        wait: read the loads on the host and leave out pairs that are not kept. Off the CPU the host waits for the
            device.
    """
    num_pairs, device = plan.token_N.shape[0], plan.token_N.device
    expert_N, pair_M = torch.where(plan.kept_N, plan.expert_N, plan.num_experts).sort(stable=True)
    # searched for and not counted: bincount would read the size of its output from the device
    end_E = torch.searchsorted(expert_N, torch.arange(plan.num_experts, device=device), right=True)
    row_N = torch.empty_like(pair_M).scatter_(0, pair_M, torch.arange(num_pairs, device=device))
    by_token_M = plan.by_token()
    lengths = None
    if wait:
        ends = end_E.tolist()
        lengths = [end - start for start, end in pairwise([0, *ends])]
        if ends[-1] < num_pairs:
            pair_M = pair_M[: ends[-1]]
            by_token_M = by_token_M[plan.kept_N[by_token_M]]
    offset_T = torch.searchsorted(plan.token_N[by_token_M], torch.arange(plan.num_tokens, device=device))
    return SortedPairs(pair_M, plan.token_N[pair_M], end_E, row_N[by_token_M], by_token_M, offset_T, lengths)


def gather_rows(tokens_TD: Tensor, pairs: SortedPairs) -> Tensor:
    """Return each row's token, (M, D)."""
    rows_MD: Tensor = _Gather.apply(tokens_TD, pairs)
    return rows_MD


def combine(rows_MD: Tensor, weight_N: Tensor, pairs: SortedPairs, dtype: torch.dtype) -> Tensor:
    """Sum weight x row per token, at least in fp32 (the weights' dtype), and return (T, D) in `dtype`."""
    wide = torch.promote_types(rows_MD.dtype, weight_N.dtype)
    out_TD: Tensor = _Combine.apply(rows_MD, weight_N.to(wide), pairs)
    return out_TD.to(dtype)


def sum_bags(rows_MD: Tensor, pairs: SortedPairs, weight_N: Tensor | None = None) -> Tensor:
    """Return each token's sum of (weighted) rows, (T, D), zeros for a token without any. No gradient."""
    if pairs.bag_M.shape[0] == 0:
        return rows_MD.new_zeros(pairs.offset_T.shape[0], rows_MD.shape[1])
    bag_weight = None if weight_N is None else weight_N[pairs.pair_of_bag_M]
    return F.embedding_bag(pairs.bag_M, rows_MD, pairs.offset_T, mode="sum", per_sample_weights=bag_weight)


class _Gather(torch.autograd.Function):
    """tokens[token_M]; the gradient of a token is the sum over its rows."""

    @staticmethod
    def forward(ctx: FunctionCtx, tokens_TD: Tensor, pairs: SortedPairs) -> Tensor:
        ctx.pairs = pairs  # type: ignore[attr-defined]
        return tokens_TD.index_select(0, pairs.token_M)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient_MD: Tensor) -> tuple[Tensor, None]:
        return sum_bags(gradient_MD.contiguous(), ctx.pairs), None  # type: ignore[attr-defined]


class _Combine(torch.autograd.Function):
    """Sum weight x row per token, in the weights' dtype; a row's gradient is that of its token, times its weight."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows_MD: Tensor, weight_N: Tensor, pairs: SortedPairs) -> Tensor:
        ctx.save_for_backward(rows_MD, weight_N)
        ctx.pairs = pairs  # type: ignore[attr-defined]
        return sum_bags(rows_MD.to(weight_N.dtype), pairs, weight_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        rows_MD, weight_N = ctx.saved_tensors  # type: ignore[attr-defined]
        pairs: SortedPairs = ctx.pairs  # type: ignore[attr-defined]
        gradient_MD = gradient_TD.index_select(0, pairs.token_M)
        with torch.autocast(rows_MD.device.type, enabled=False):  # or vecdot would round a whole backward pass to bf16
            weight_gradient_M = torch.linalg.vecdot(gradient_MD, rows_MD.to(gradient_MD.dtype))
        weight_gradient_N = torch.zeros_like(weight_N).scatter_(0, pairs.pair_M, weight_gradient_M)
        rows_gradient_MD = gradient_MD * weight_N[pairs.pair_M].unsqueeze(-1)
        return rows_gradient_MD.to(rows_MD.dtype), weight_gradient_N, None
