"""GShard top-2: always the best expert, and the second with a probability that grows with its weight.

    g1, g2 = the two largest probabilities, renormalised to sum 1
    the second expert is used with probability min(1, g2 / threshold)

GShard (arXiv 2006.16668, "random routing") uses threshold 0.5, that is 2 g2; ST-MoE (arXiv 2202.08906)
uses 0.2. Evaluation uses both experts.
"""

import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.routing_plan import PairPlan, RoutingInput
from lightning_moevlm.model.routers.choices import make_plan, renormalise_weights
from lightning_moevlm.model.routers.gate import Gate
from lightning_moevlm.model.routers.router import LinearRouter


class GShardRouter(LinearRouter):
    """Top-2 with a random second expert.

    Args:
        dim: model width D.
        num_experts: E, at least 2.
        threshold: second weight from which the second expert is always used, above 0.
        gate: jitter, dropout, temperature, initial scale.

    Raises:
        UserError: fewer than 2 experts, or a threshold that is not positive.
    """

    def __init__(self, dim: int, num_experts: int, threshold: float = 0.5, gate: Gate = Gate()) -> None:
        super().__init__(dim, num_experts, gate)
        if num_experts < 2:
            raise UserError(f"moe.num_experts is {num_experts}: GShardRouter needs at least 2 experts")
        check_number("threshold", threshold, above=0, advice=", such as 0.5 (GShard) or 0.2 (ST-MoE)")
        self.threshold = threshold

    @property
    def experts_per_token(self) -> float:
        """2: what evaluation runs, and training at most."""
        return 2.0

    def forward(self, inputs: RoutingInput) -> PairPlan:
        """Route T tokens to one or two experts each."""
        logits_TE = self.gate.logits(inputs.tokens_TD, self.weight_ED, self.training)
        probs_TE = logits_TE.softmax(dim=-1)
        top_TK, expert_TK = probs_TE.topk(2, dim=-1)
        weight_TK = renormalise_weights(top_TK)
        chosen_TK = torch.ones_like(expert_TK, dtype=torch.bool)
        if self.training:
            second_T = weight_TK[:, 1].detach()
            chosen_TK[:, 1] = torch.rand_like(second_T) < second_T / self.threshold
        return make_plan(inputs, logits_TE, probs_TE, expert_TK, weight_TK, chosen_TK)
