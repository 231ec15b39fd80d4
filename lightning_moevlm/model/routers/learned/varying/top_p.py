"""Top-p: the fewest experts that reach a share of the probability; easy tokens use few, hard ones many.

    experts = the smallest set of largest p whose sum reaches `threshold`, at most max_k

Dynamic routing (arXiv 2403.07652, section 2.2), where an entropy loss keeps the sets small.
"""

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import PairPlan, RoutingInput
from lightning_moevlm.model.routers.choices import check_top_k, make_plan
from lightning_moevlm.model.routers.gate import Gate
from lightning_moevlm.model.routers.router import LinearRouter


class TopPRouter(LinearRouter):
    """A dynamic number of experts per token.

    Args:
        dim: model width D.
        num_experts: E.
        threshold: share of probability to reach, in (0, 1].
        max_k: most experts of one token; active FLOPs are counted with it, an upper bound.
        gate: jitter, dropout, temperature, initial scale.

    Raises:
        UserError: max_k or threshold outside its range.
    """

    choices_vary = True

    def __init__(self, dim: int, num_experts: int, threshold: float = 0.4, max_k: int = 4, gate: Gate = Gate()) -> None:
        super().__init__(dim, num_experts, gate)
        check_top_k(max_k, num_experts, key="max_k")
        if not 0 < threshold <= 1:
            raise UserError(f"router.threshold is {threshold}: choose a share above 0 and up to 1")
        self.threshold = threshold
        self.max_k = max_k

    @property
    def experts_per_token(self) -> float:
        """max_k, an upper bound."""
        return float(self.max_k)

    def forward(self, inputs: RoutingInput) -> PairPlan:
        """Route T tokens to 1 to max_k experts each."""
        logits_TE = self.gate.logits(inputs.tokens_TD, self.weight_ED, self.training)
        probs_TE = logits_TE.softmax(dim=-1)
        weight_TK, expert_TK = probs_TE.topk(self.max_k, dim=-1)
        reached_before_TK = weight_TK.detach().cumsum(dim=-1) - weight_TK.detach()
        return make_plan(
            inputs, logits_TE, probs_TE, expert_TK, weight_TK, chosen_TK=reached_before_TK < self.threshold
        )
