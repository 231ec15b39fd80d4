"""Group-limited top-k: a token first chooses a few groups of experts, then experts within them.

    p = softmax(logits),   top-k p among the experts of the best groups (`group_limit`),   weight_e = p_e

DeepSeek-V2 (arXiv 2405.04434, section 2.2.2). DeepSeek-V3 limits groups too, by other scores: `SigmoidBiasRouter` with
`groups`.
"""

from lightning_moevlm.contracts.routing_plan import PairPlan, RoutingInput
from lightning_moevlm.model.routers.choices import choose_experts, make_plan
from lightning_moevlm.model.routers.gate import Gate
from lightning_moevlm.model.routers.group_limit import GroupLimit
from lightning_moevlm.model.routers.router import LinearRouter


class GroupLimitedRouter(LinearRouter):
    """Softmax top-k within the best groups.

    Args:
        dim: model width D.
        num_experts: E, a multiple of the number of groups.
        top_k: experts per token, at most those of the best groups.
        groups: number of groups, and number that a token may use.
        gate: jitter, dropout, temperature, initial scale.

    Raises:
        UserError: numbers that do not fit each other.
    """

    takes_choices = True

    def __init__(
        self, dim: int, num_experts: int, top_k: int = 2, groups: GroupLimit = GroupLimit(), gate: Gate = Gate()
    ) -> None:
        super().__init__(dim, num_experts, gate)
        groups.check(num_experts, top_k)
        self.top_k = top_k
        self.groups = groups

    def forward(self, inputs: RoutingInput) -> PairPlan:
        """Route T tokens to K experts each."""
        logits_TE = self.gate.logits(inputs.tokens_TD, self.weight_ED, self.training)
        probs_TE = logits_TE.softmax(dim=-1)
        expert_TK = choose_experts(self.groups.limit_scores(probs_TE.detach()), self.top_k, inputs)
        return make_plan(inputs, logits_TE, probs_TE, expert_TK, probs_TE.gather(-1, expert_TK))
