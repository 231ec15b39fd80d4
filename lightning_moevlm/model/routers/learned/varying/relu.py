"""ReLU routing: a token uses every expert whose score is positive; the number is steered by an L1 loss.

    weight_e = max(0, (x W^T)_e)

ReMoE (arXiv 2412.14711, ReLU routing): fully differentiable, no discontinuity where experts change. Without the
adaptive L1 loss on the weights about half of the experts are active.
"""

import torch

from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.routing_plan import PairPlan, RoutingInput
from lightning_moevlm.model.routers.choices import make_plan, renormalise_weights
from lightning_moevlm.model.routers.gate import Gate, refuse_zero_start
from lightning_moevlm.model.routers.router import LinearRouter


class ReLURouter(LinearRouter):
    """Every expert with a positive score.

    Args:
        dim: model width D.
        num_experts: E.
        target_k: experts per token that the L1 loss steers to; active FLOPs are counted with it.
        gate: jitter, dropout, temperature, initial scale.

    Raises:
        UserError: target_k outside (0, E], or a gate that starts at 0.
    """

    choices_vary = True

    def __init__(self, dim: int, num_experts: int, target_k: float = 1.0, gate: Gate = Gate()) -> None:
        super().__init__(dim, num_experts, gate)
        check_number("target_k", target_k, above=0, most=num_experts, advice=" (num_experts)")
        refuse_zero_start(gate, "ReLURouter", "no score is positive, so no expert is chosen and there is no gradient")
        self.target_k = target_k

    @property
    def experts_per_token(self) -> float:
        """The target, which training approaches."""
        return self.target_k

    def forward(self, inputs: RoutingInput) -> PairPlan:
        """List all T x E pairs and use the positive ones; probs_TE are the weights divided by their sum."""
        logits_TE = self.gate.logits(inputs.tokens_TD, self.weight_ED, self.training)
        weight_TE = logits_TE.relu()
        expert_TE = torch.arange(self.num_experts, device=logits_TE.device).expand_as(logits_TE)
        return make_plan(
            inputs, logits_TE, renormalise_weights(weight_TE), expert_TE, weight_TE, chosen_TK=weight_TE > 0
        )
