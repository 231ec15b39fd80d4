"""Controls: routers that learn nothing, to measure what learned routing is worth.

random: a fixed pseudo-random draw for each position. balanced: experts in turn, so loads are equal, which is the forced
balance that throughput benchmarks use. Positions are those of the batch while training, and those of the sample in
evaluation. Weights are 1 / k; there are no parameters.
"""

from typing import Literal

import torch
from torch import Tensor

from lightning_moevlm.contracts.routing_plan import PairPlan, RoutingInput
from lightning_moevlm.model.routers.choices import check_top_k, count_turns, draw_choices, even_plan
from lightning_moevlm.model.routers.router import Router


class FixedRouter(Router):
    """Routes by position alone.

    Args:
        dim: model width D, not used.
        num_experts: E.
        rule: "random" or "balanced".
        top_k: experts per token.

    Raises:
        UserError: top_k outside 1..E.
    """

    def __init__(
        self, dim: int, num_experts: int, rule: Literal["random", "balanced"] = "balanced", top_k: int = 1
    ) -> None:
        super().__init__(dim, num_experts)
        check_top_k(top_k, num_experts)
        self.rule = rule
        self.top_k = top_k

    @property
    def experts_per_token(self) -> float:
        """K."""
        return float(self.top_k)

    def forward(self, inputs: RoutingInput) -> PairPlan:
        """Route T tokens to K experts each."""
        turn_T = count_turns(inputs.valid_T, inputs.num_sequences, self.training)  # padding takes no turn
        if self.rule == "random":
            expert_TK = draw_choices(turn_T, self.num_experts, self.top_k, seed=0)
        else:
            expert_TK = self._balance(turn_T.unsqueeze(-1))
        return even_plan(inputs, expert_TK, self.num_experts)

    def _balance(self, turn_T1: Tensor) -> Tensor:
        return (turn_T1 * self.top_k + torch.arange(self.top_k, device=turn_T1.device)) % self.num_experts
