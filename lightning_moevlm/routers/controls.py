"""Controls: routers that learn nothing, so that an ablation can ask what learning to route is worth.

random: a fixed pseudo-random expert for each position of the batch. balanced: experts in turn, so loads are equal.
by modality: each modality has experts of its own and takes them in turn. Weights are 1 / k; there are no parameters.
"""

from typing import Literal

import torch
from torch import Tensor

from lightning_moevlm.plans import PairPlan, RoutingInput
from lightning_moevlm.routers.choices import check_top_k, plan_of_choices
from lightning_moevlm.routers.router import Router

_PRIME = 2_654_435_761  # Knuth's multiplicative hash: spreads neighbours over the experts


class FixedRouter(Router):
    """Routes by position or modality alone.

    Args:
        dim: model width D, not used.
        num_experts: E.
        rule: "random", "balanced" or "modality" (even experts for images, odd ones for text; needs an even E).
        top_k: experts per token.

    Raises:
        UserError: top_k outside 1..E (for "modality" of a modality's share of E).
    """

    def __init__(
        self, dim: int, num_experts: int, rule: Literal["random", "balanced", "modality"] = "balanced", top_k: int = 1
    ) -> None:
        super().__init__(dim, num_experts)
        check_top_k(top_k, num_experts // 2 if rule == "modality" else num_experts)
        self.rule = rule
        self.top_k = top_k

    @property
    def experts_per_token(self) -> float:
        """K."""
        return float(self.top_k)

    def forward_flops_per_token(self) -> int:
        """0: nothing is computed."""
        return 0

    def forward(self, inputs: RoutingInput) -> PairPlan:
        """Route T tokens to K neighbouring experts each; logits_TE are 0 and probs_TE even."""
        first_T = self._first(inputs)
        step = 2 if self.rule == "modality" else 1
        choice_K = torch.arange(self.top_k, device=first_T.device) * step
        expert_TK = (first_T.unsqueeze(-1) + choice_K) % self.num_experts
        logits_TE = torch.zeros(first_T.shape[0], self.num_experts, device=first_T.device)
        weight_TK = torch.full(expert_TK.shape, 1.0 / self.top_k, device=first_T.device)
        return plan_of_choices(inputs, logits_TE, logits_TE.softmax(dim=-1), expert_TK, weight_TK)

    def _first(self, inputs: RoutingInput) -> Tensor:
        rank_T = inputs.valid_T.cumsum(dim=0) - 1  # padding takes no turn
        if self.rule == "random":
            return (rank_T.clamp(min=0) * _PRIME % 2**32 // 2**16) % self.num_experts
        if self.rule == "modality":
            return (rank_T.clamp(min=0) * 2 + inputs.modality_T) % (self.num_experts // 2 * 2)
        return rank_T.clamp(min=0) % self.num_experts
