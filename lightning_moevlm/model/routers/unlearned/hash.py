"""Hash routing: a token's identity fixes its experts; nothing is learned.

    experts = the k largest of h(identity, e)        h: a fixed pseudo-random number for each identity and expert

Hash layers (Roller et al. 2021, arXiv 2106.04426, section 3). The identity of a text token is its id, that of an image
patch the code that `layers.PatchCodes` gives it; a masked position has the identity of the mask, so all of them share
their experts. Loads are even over many identities, not over their frequencies.
"""

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import PairPlan, RoutingInput
from lightning_moevlm.model.routers.choices import check_top_k, draw_choices, even_plan
from lightning_moevlm.model.routers.router import Router


class HashRouter(Router):
    """Experts by token id or patch code.

    Args:
        dim: model width D, not used.
        num_experts: E.
        top_k: experts per token.
        seed: of the hash; another seed is another assignment.

    Raises:
        UserError: top_k outside 1..E; tokens without identities.
    """

    reads_identity = True

    def __init__(self, dim: int, num_experts: int, top_k: int = 1, seed: int = 0) -> None:
        super().__init__(dim, num_experts)
        check_top_k(top_k, num_experts)
        self.top_k = top_k
        self.seed = seed

    @property
    def experts_per_token(self) -> float:
        """K."""
        return float(self.top_k)

    def forward(self, inputs: RoutingInput) -> PairPlan:
        """Route T tokens to K experts each."""
        if inputs.identity_T is None:
            raise UserError(
                "HashRouter routes by token ids and patch codes, which this backbone does not provide: choose VLMoE, "
                "LIMoE, MoMa or MoEDecoder, or a router that reads tokens, such as TopKRouter"
            )
        expert_TK = draw_choices(inputs.identity_T, self.num_experts, self.top_k, self.seed)
        return even_plan(inputs, expert_TK, self.num_experts)
