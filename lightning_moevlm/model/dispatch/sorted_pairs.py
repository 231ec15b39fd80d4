"""Sorts pairs by expert, to run them, and by token, to sum them (a bag of rows per token).

Both ways are gathers, forward and backward: a token's rows are read where they lie and summed, in plan order, so equal
plans give equal sums on every device, and nothing is added into place by index.
"""

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
    load_E: int64, kept pairs per expert.
    bag_M: int64, rows ordered by token.
    offset_T: int64, start of each token's bag in bag_M.
    lengths: load_E on the host, and the rows are the kept pairs; None: the rows are all N pairs, those not kept last.
    """

    pair_M: Tensor
    token_M: Tensor
    load_E: Tensor
    bag_M: Tensor
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
    bucket_N = torch.where(plan.kept_N, plan.expert_N, plan.num_experts)
    load = _count(bucket_N, plan.num_experts + 1)
    load_E = load[: plan.num_experts]
    pair_M = bucket_N.argsort(stable=True)
    row_N = torch.empty_like(pair_M).scatter_(0, pair_M, torch.arange(num_pairs, device=device))
    by_token_M = _by_token(plan, wait)
    lengths: list[int] | None = load_E.tolist() if wait else None
    if lengths is not None and sum(lengths) < num_pairs:
        pair_M = pair_M[: sum(lengths)]
        by_token_M = by_token_M[plan.kept_N[by_token_M]]
    num_rows_T = _count(plan.token_N[by_token_M], plan.num_tokens)
    offset_T = num_rows_T.cumsum(0) - num_rows_T
    return SortedPairs(pair_M, plan.token_N[pair_M], load_E, row_N[by_token_M], offset_T, lengths)


def gather_rows(tokens_TD: Tensor, pairs: SortedPairs) -> Tensor:
    """Return each row's token, (M, D)."""
    rows_MD: Tensor = _Gather.apply(tokens_TD, pairs)
    return rows_MD


def combine(rows_MD: Tensor, weight_N: Tensor, pairs: SortedPairs, dtype: torch.dtype) -> Tensor:
    """Sum weight x row per token, at least in fp32 (the weights' dtype), and return (T, D) in `dtype`."""
    wide = torch.promote_types(rows_MD.dtype, weight_N.dtype)
    out_TD: Tensor = _Combine.apply(rows_MD.to(wide), weight_N.to(wide), pairs)
    return out_TD.to(dtype)


def sum_bags(rows_MD: Tensor, pairs: SortedPairs, weight_M: Tensor | None = None) -> Tensor:
    """Return each token's sum of (weighted) rows, (T, D), zeros for a token without any. No gradient."""
    if pairs.bag_M.shape[0] == 0:
        return rows_MD.new_zeros(pairs.offset_T.shape[0], rows_MD.shape[1])
    bag_weight = None if weight_M is None else weight_M[pairs.bag_M]
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
    """Sum weight x row per token; a row's gradient is that of its token, times its weight."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows_MD: Tensor, weight_N: Tensor, pairs: SortedPairs) -> Tensor:
        ctx.save_for_backward(rows_MD, weight_N)
        ctx.pairs = pairs  # type: ignore[attr-defined]
        return sum_bags(rows_MD, pairs, weight_N[pairs.pair_M])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        rows_MD, weight_N = ctx.saved_tensors  # type: ignore[attr-defined]
        pairs: SortedPairs = ctx.pairs  # type: ignore[attr-defined]
        gradient_MD = gradient_TD.index_select(0, pairs.token_M)
        with torch.autocast(rows_MD.device.type, enabled=False):  # or vecdot would round a whole backward pass to bf16
            weight_gradient_M = torch.linalg.vecdot(gradient_MD, rows_MD)
        weight_gradient_N = torch.zeros_like(weight_N).scatter_(0, pairs.pair_M, weight_gradient_M)
        return gradient_MD * weight_N[pairs.pair_M].unsqueeze(-1), weight_gradient_N, None


def _count(values_N: Tensor, num_values: int) -> Tensor:
    # no bincount: its output size would be read from the device
    return values_N.new_zeros(num_values).scatter_add_(0, values_N, torch.ones_like(values_N))


def _by_token(plan: PairPlan, wait: bool) -> Tensor:
    """Return the pairs ordered by token, in plan order within one."""
    num_pairs, num_tokens = plan.token_N.shape[0], plan.num_tokens
    if wait and plan.token_N.device.type == "cpu" and num_tokens and num_pairs % num_tokens == 0:
        choices = num_pairs // num_tokens  # most routers give pairs choice by choice: then no second sort is needed
        if torch.equal(plan.token_N.view(choices, num_tokens), torch.arange(num_tokens).expand(choices, num_tokens)):
            return torch.arange(num_pairs).view(choices, num_tokens).t().reshape(-1)
    return plan.token_N.argsort(stable=True)
