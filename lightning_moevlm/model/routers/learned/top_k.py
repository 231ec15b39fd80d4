"""Softmax top-k: each token goes to the k experts that it scores highest.

    logits = x W^T,   p = softmax(logits),   experts = top-k(p),   weight_e = p_e   (or p_e / sum of the chosen p)

Shazeer et al. 2017 (arXiv 1701.06538, section 2.1); without renormalisation and with k = 1 it is Switch
(arXiv 2101.03961, equation 2), which is what VL-MoE uses (arXiv 2303.07226). Renormalised weights are the softmax over
the chosen logits alone, so "softmax after selection" is the same switch.
"""

from lightning_moevlm.contracts.routing_plan import PairPlan, RoutingInput
from lightning_moevlm.model.routers.choices import (
    check_renormalise,
    check_top_k,
    choose_experts,
    make_plan,
    renormalise_weights,
)
from lightning_moevlm.model.routers.gate import Gate
from lightning_moevlm.model.routers.router import LinearRouter


class TopKRouter(LinearRouter):
    """Softmax over all experts, then the k largest.

    Args:
        dim: model width D.
        num_experts: E.
        top_k: experts per token, 1 <= top_k <= E.
        renormalise: divide the chosen weights by their sum. Needs top_k >= 2: a single weight would always be 1 and the
            task loss could no longer reach the router.
        gate: jitter, dropout, temperature, initial scale.

    Raises:
        UserError: top_k outside 1..E, or renormalise with top_k = 1.
    """

    takes_choices = True

    def __init__(
        self, dim: int, num_experts: int, top_k: int = 1, renormalise: bool = False, gate: Gate = Gate()
    ) -> None:
        super().__init__(dim, num_experts, gate)
        check_top_k(top_k, num_experts)
        check_renormalise(renormalise, top_k)
        self.top_k = top_k
        self.renormalise = renormalise

    def forward(self, inputs: RoutingInput) -> PairPlan:
        """Route T tokens to K experts each."""
        logits_TE = self.gate.logits(inputs.tokens_TD, self.weight_ED, self.training)
        probs_TE = logits_TE.softmax(dim=-1)
        expert_TK = choose_experts(probs_TE, self.top_k, inputs)
        weight_TK = probs_TE.gather(-1, expert_TK)
        if self.renormalise:
            weight_TK = renormalise_weights(weight_TK)
        return make_plan(inputs, logits_TE, probs_TE, expert_TK, weight_TK)
