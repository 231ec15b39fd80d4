"""Free experts: choices that cost nothing, so that easy tokens may leave the others out (zero-computation experts).

    zero: 0,     copy: x,     constant: a_1 x + a_2 v with (a_1, a_2) = softmax(x W), v and W learned

MoE++ (arXiv 2410.07348; its released code has one zero, one copy and two constant experts to a layer) and LongCat-Flash
(arXiv 2509.01322: copies). They are the last of the router's experts and have no place limit. MoE++ starts v at unit
variance, here it starts as small as other weights; its gating residuals and its smaller balance weight for free
experts are not built.
"""

import torch
from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.routing_plan import PairPlan
from lightning_moevlm.model.initial_weights import Module
from lightning_moevlm.model.precision import Region


class FreeExperts(Module):
    """Zero, copy and constant experts, in this order behind the E others.

    Args:
        dim: model width D.
        num_zero: experts that return 0: the token keeps its residual.
        num_copy: experts that return their input.
        num_constant: experts that mix their input with a learned vector.

    Raises:
        UserError: a negative number, or none at all.
    """

    region: Region = "experts"

    def __init__(self, dim: int, num_zero: int = 1, num_copy: int = 1, num_constant: int = 2) -> None:
        super().__init__()
        for name, value in (("num_zero", num_zero), ("num_copy", num_copy), ("num_constant", num_constant)):
            check_number(f"moe.free.{name}", value, least=0)
        self.num_free = num_zero + num_copy + num_constant
        if not self.num_free:
            raise UserError("moe.free has no expert: raise num_zero, num_copy or num_constant, or set moe.free to null")
        self.sizes = [num_zero, num_copy, num_constant]
        self.constant = nn.Parameter(torch.empty(num_constant, dim)) if num_constant else None
        self.mix = nn.Parameter(torch.empty(num_constant, dim, 2)) if num_constant else None

    def forward(self, plan: PairPlan, tokens_TD: Tensor) -> Tensor:
        """Return what the kept pairs of free experts give, (T, D) in the tokens' dtype.

        plan: over all experts, of which the last are free.
        """
        weights = weigh_free(plan, self.num_free)
        wide_TD = tokens_TD.to(weights.dtype)
        _, copied, mixed = weights.split(self.sizes, dim=-1)
        own_T1 = copied.sum(dim=-1, keepdim=True)
        out_TD = torch.zeros_like(wide_TD)
        if self.constant is not None and self.mix is not None:
            shares = torch.einsum("td,cda->tca", wide_TD, self.mix.to(wide_TD.dtype)).softmax(dim=-1)
            own_T1 = own_T1 + (mixed * shares[..., 0]).sum(dim=-1, keepdim=True)
            out_TD = (mixed * shares[..., 1]) @ self.constant.to(wide_TD.dtype)
        return (out_TD + own_T1 * wide_TD).to(tokens_TD.dtype)


def weigh_free(plan: PairPlan, num_free: int) -> Tensor:
    """Return the weight of each token at each free expert, fp32 (T, num_free), 0 where it does not go."""
    place_N = plan.expert_N - (plan.num_experts - num_free)
    num_cells = plan.num_tokens * num_free
    # a token is in a cell once; pairs that do not go meet in a last cell, which is cut off
    cell_N = torch.where(plan.kept_N & (place_N >= 0), plan.token_N * num_free + place_N, num_cells)
    weights = plan.weight_N.new_zeros(num_cells + 1).scatter(0, cell_N, plan.weight_N)
    return weights[:num_cells].view(plan.num_tokens, num_free)


def leave_out_free(plan: PairPlan, num_free: int) -> PairPlan:
    """Return the plan of the other experts alone; pairs stay where they are, those of free experts are not chosen."""
    num_others = plan.num_experts - num_free
    others_N = plan.expert_N < num_others
    return plan._replace(
        expert_N=plan.expert_N.clamp(max=num_others - 1),
        chosen_N=plan.chosen_N & others_N,
        kept_N=plan.kept_N & others_N,
        logits_TE=plan.logits_TE[:, :num_others],
        probs_TE=plan.probs_TE[:, :num_others],
    )
