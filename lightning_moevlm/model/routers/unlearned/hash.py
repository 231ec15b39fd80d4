"""Hash routing: what a token is decides where it goes, for ever; nothing is learned.

    experts = the k largest of h(identity, e)        h: a fixed pseudo-random number for each identity and expert

Hash layers (Roller et al. 2021, arXiv 2106.04426, section 3). The identity of a text token is its id, that of an image
patch the code that `layers.PatchCodes` gives it; a masked position has the identity of the mask, so all of them share
their experts. Loads are even over many identities, not over their frequencies.
"""

import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import PairPlan, RoutingInput
from lightning_moevlm.model.routers.choices import check_top_k, even_plan
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
                "HashRouter needs to know what each token is, and this model gives no identities: set identity_BS in "
                "its Layout, or choose a router that reads the tokens themselves"
            )
        expert_E = torch.arange(self.num_experts, device=inputs.identity_T.device)
        draw_TE = scramble(inputs.identity_T.unsqueeze(-1) * self.num_experts + expert_E, self.seed)
        return even_plan(inputs, draw_TE.topk(self.top_k, dim=-1).indices, self.num_experts)


def scramble(values: Tensor, seed: int) -> Tensor:
    """Return a pseudo-random int64 for each int64: the finaliser of splitmix64, arithmetic modulo 2^64."""
    offset = (seed + 1) * 0x9E3779B97F4A7C15 % 2**64  # 2^64 / golden ratio
    mixed = values + (offset - 2**64 if offset >= 2**63 else offset)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed = (mixed ^ _shift_right(mixed, shift)) * factor
    return mixed ^ _shift_right(mixed, 31)


def _shift_right(values: Tensor, places: int) -> Tensor:
    """Shift right and fill with zeros; torch's own shift of signed numbers keeps the sign."""
    return (values >> places) & ((1 << (64 - places)) - 1)
