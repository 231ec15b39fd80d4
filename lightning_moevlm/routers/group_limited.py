"""Group-limited top-k: a token first chooses a few groups of experts, then experts within them.

    p = softmax(logits),   group score = sum of the top-2 p in it (or the largest),   top-k among the best groups

Device-limited routing of DeepSeek-V2 (arXiv 2405.04434, section 2.2.2, largest) and node-limited routing of DeepSeek-V3
(arXiv 2412.19437, sum of the top k / groups): with a group per device it bounds communication.
"""

import torch
from torch import nn

from lightning_moevlm.errors import UserError
from lightning_moevlm.plans import PairPlan, RoutingInput
from lightning_moevlm.ranges import check_number
from lightning_moevlm.routers.choices import check_top_k, plan_of_choices
from lightning_moevlm.routers.gate import Gate
from lightning_moevlm.routers.router import Router


class GroupLimitedRouter(Router):
    """Softmax top-k within the best groups.

    Args:
        dim: model width D.
        num_experts: E, a multiple of num_groups.
        num_groups: groups of equal size, neighbours together.
        top_groups: groups that a token may use.
        top_k: experts per token, at most those of top_groups groups.
        experts_per_score: how many of a group's largest probabilities make its score.
        gate: jitter, dropout, temperature, initial scale.

    Raises:
        UserError: numbers that do not fit each other.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        num_groups: int = 2,
        top_groups: int = 1,
        top_k: int = 2,
        experts_per_score: int = 2,
        gate: Gate = Gate(),
    ) -> None:
        super().__init__(dim, num_experts, gate)
        if num_groups < 1 or num_experts % num_groups:
            raise UserError(f"num_experts {num_experts} is no multiple of num_groups {num_groups}: change one of them")
        if not 1 <= top_groups <= num_groups:
            raise UserError(f"top_groups is {top_groups} with num_groups {num_groups}: choose 1 to {num_groups}")
        check_number("experts_per_score", experts_per_score, least=1)
        self.group_size = num_experts // num_groups
        check_top_k(top_k, top_groups * self.group_size)
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.top_k = top_k
        self.experts_per_score = min(experts_per_score, self.group_size)
        self.weight_ED = nn.Parameter(torch.empty(num_experts, dim))

    @property
    def experts_per_token(self) -> float:
        """K."""
        return float(self.top_k)

    def forward_flops_per_token(self) -> int:
        """2 D E."""
        return 2 * self.dim * self.num_experts

    def forward(self, inputs: RoutingInput) -> PairPlan:
        """Route T tokens to K experts each."""
        logits_TE = self.gate.logits(inputs.tokens_TD, self.weight_ED, self.training)
        probs_TE = logits_TE.softmax(dim=-1)
        grouped = probs_TE.detach().unflatten(-1, (self.num_groups, self.group_size))
        scores = grouped.topk(self.experts_per_score, dim=-1).values.sum(dim=-1)
        allowed = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(self.top_groups).indices, True)
        allowed_TE = allowed.repeat_interleave(self.group_size, dim=-1)
        expert_TK = probs_TE.detach().masked_fill(~allowed_TE, -1.0).topk(self.top_k, dim=-1).indices
        return plan_of_choices(inputs, logits_TE, probs_TE, expert_TK, probs_TE.gather(-1, expert_TK))
