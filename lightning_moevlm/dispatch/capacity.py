"""Expert capacity: at most `ceil(factor x kept pairs / E)` pairs per expert, the rest is dropped to the residual.

Priority decides who stays: "position" serves first choices before second ones and earlier tokens before later
(Switch, arXiv 2101.03961, section 2.2), "gate" serves the largest gate weights first: batch-priority routing
(V-MoE, arXiv 2106.05974, section 4).
"""

from dataclasses import dataclass
from typing import Literal

import torch

from lightning_moevlm.plans import PairPlan

Priority = Literal["position", "gate"]


@dataclass(frozen=True)
class Capacity:
    """Capacity factors of training and evaluation; null is dropless.

    Args:
        train_factor: typically 1.0 to 1.25.
        eval_factor: typically 2.0; can be swept without retraining.
        priority: who stays when an expert is full.
    """

    train_factor: float | None = 1.25
    eval_factor: float | None = 2.0
    priority: Priority = "position"


def apply_capacity(plan: PairPlan, factor: float, priority: Priority) -> PairPlan:
    """Return the plan with pairs over capacity no longer kept; order, shapes and weights stay."""
    bucket_N = torch.where(plan.kept_N, plan.expert_N, plan.num_experts)
    if priority == "gate":
        by_gate_N = plan.weight_N.argsort(descending=True, stable=True)
        order_N = by_gate_N[bucket_N[by_gate_N].argsort(stable=True)]
    else:
        order_N = bucket_N.argsort(stable=True)
    load = torch.bincount(bucket_N, minlength=plan.num_experts + 1)
    start = load.cumsum(0) - load
    sorted_bucket_N = bucket_N[order_N]
    rank_sorted_N = torch.arange(order_N.shape[0], device=order_N.device) - start[sorted_bucket_N]
    rank_N = torch.empty_like(rank_sorted_N).scatter_(0, order_N, rank_sorted_N)
    # in float64 and with a little slack: 1.2 * 25 / 3 is 10, not the 11 that rounding errors make of it
    capacity = torch.ceil(plan.kept_N.sum().double() * factor / plan.num_experts - 1e-9)
    return plan._replace(kept_N=plan.kept_N & (rank_N < capacity))
