"""Cosine routing: scores are angles, so neither long tokens nor long rows win by length.

    z = x P (to few dimensions),   logits_e = cos(z, w_e) / tau,   then softmax top-k

X-MoE (arXiv 2204.09179, section 3.2). tau is learned from `gate.temperature` on, as in its paper, or stays there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.routing_plan import PairPlan, RoutingInput
from lightning_moevlm.model.routers.choices import check_top_k, choose_experts, make_plan
from lightning_moevlm.model.routers.gate import Gate, refuse_zero_start
from lightning_moevlm.model.routers.router import ExpertAxis, Router


class CosineRouter(Router):
    """Top-k by angle in a small space.

    Args:
        dim: model width D.
        num_experts: E.
        top_k: experts per token.
        routing_dim: width of the space; X-MoE uses 16.
        learn_temperature: learn a factor on the logits, which starts at 1.
        gate: jitter, dropout, temperature (tau at the start), initial scale.

    Raises:
        UserError: top_k outside 1..E, a space without dimensions, or a gate that starts at 0.
    """

    takes_choices = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 1,
        routing_dim: int = 16,
        learn_temperature: bool = True,
        gate: Gate = Gate(temperature=0.07),
    ) -> None:
        super().__init__(dim, num_experts, gate)
        check_top_k(top_k, num_experts)
        check_number("routing_dim", routing_dim, least=1)
        refuse_zero_start(gate, "CosineRouter", "a vector of length 0 has no direction")
        self.top_k = top_k
        self.routing_dim = routing_dim
        self.project_weight = nn.Parameter(torch.empty(routing_dim, dim))
        self.expert_weight = nn.Parameter(torch.empty(num_experts, routing_dim))
        self.scale = nn.Parameter(torch.ones(())) if learn_temperature else None

    @property
    def experts_per_token(self) -> float:
        """K."""
        return float(self.top_k)

    def per_expert(self) -> tuple[ExpertAxis, ...]:
        """The experts' directions; projection and scale are shared."""
        return (ExpertAxis(self.expert_weight, 0),)

    def forward_flops_per_token(self) -> int:
        """2 D d + 2 d E with routing_dim d."""
        return 2 * self.routing_dim * (self.dim + self.num_experts)

    def rows(self) -> Tensor:
        """Return the experts' vectors in the small space, (E, routing_dim)."""
        return self.expert_weight

    def forward(self, inputs: RoutingInput) -> PairPlan:
        """Route T tokens to K experts each."""
        tokens_TD = self.gate.inputs(inputs.tokens_TD, self.training)
        projected = F.linear(tokens_TD, self.project_weight.to(tokens_TD.dtype)).float()
        angles_TE = F.normalize(projected, dim=-1) @ F.normalize(self.expert_weight.float(), dim=-1).t()
        logits_TE = angles_TE.float() / self.gate.temperature  # autocast may have had the product
        if self.scale is not None:
            logits_TE = logits_TE * self.scale.float()
        probs_TE = logits_TE.softmax(dim=-1)
        expert_TK = choose_experts(probs_TE, self.top_k, inputs)
        return make_plan(inputs, logits_TE, probs_TE, expert_TK, probs_TE.gather(-1, expert_TK))
