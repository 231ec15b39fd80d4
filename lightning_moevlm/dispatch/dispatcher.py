"""The dispatch contract, and the sort that every fast path starts with."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.dispatch.expert_protocol import Experts
from lightning_moevlm.dispatch.slots import run_slots
from lightning_moevlm.plans import MixPlan, PairPlan, RoutingPlan


class Dispatcher(ABC):
    """Sends kept pairs through their experts and sums the weighted results per token.

    A token without a kept pair gets zeros: the residual connection around the layer carries it on.
    """

    def __call__(self, plan: RoutingPlan, tokens_TD: Tensor, experts: Experts) -> Tensor:
        """Return (T, D) in the tokens' dtype."""
        if isinstance(plan, MixPlan):
            return self.run_slots(plan, tokens_TD, experts)
        return self.run_pairs(plan, tokens_TD, experts)

    @abstractmethod
    def run_pairs(self, plan: PairPlan, tokens_TD: Tensor, experts: Experts) -> Tensor:
        """Return (T, D) in the tokens' dtype."""

    def run_slots(self, plan: MixPlan, tokens_TD: Tensor, experts: Experts) -> Tensor:
        """Return (T, D) in the tokens' dtype. Slots are full by construction, so one stacked product serves all."""
        return run_slots(plan, tokens_TD, experts)


class SortedPairs(NamedTuple):
    """Pairs sorted by expert, those not kept last.

    token_N, weight_N: as in the plan, sorted. load_E: int64, kept pairs per expert.
    """

    token_N: Tensor
    weight_N: Tensor
    load_E: Tensor


def sort_by_expert(plan: PairPlan) -> SortedPairs:
    """Sort stably, so that equal plans give equal sums."""
    bucket_N = torch.where(plan.kept_N, plan.expert_N, plan.num_experts)
    order_N = bucket_N.argsort(stable=True)
    load_E = torch.bincount(bucket_N, minlength=plan.num_experts + 1)[: plan.num_experts]
    return SortedPairs(plan.token_N[order_N], plan.weight_N[order_N], load_E)


def combine(rows_ND: Tensor, token_N: Tensor, weight_N: Tensor, tokens_TD: Tensor) -> Tensor:
    """Sum weight x row per token, at least in fp32 (the weights' dtype), and return it in the tokens' dtype."""
    weighted_ND = rows_ND * weight_N.unsqueeze(-1)
    out_TD = torch.zeros(tokens_TD.shape, dtype=weighted_ND.dtype, device=tokens_TD.device)
    return out_TD.index_add(0, token_N, weighted_ND).to(tokens_TD.dtype)
