"""Balance loss of GShard (arXiv 2006.16668, algorithm 1): first choices alone, whatever k is.

    loss = E^2 * mean over experts of (c_e / T) m_e = E * sum_e (c_e / T) m_e

c_e counts the tokens whose largest probability is e and carries no gradient, m_e is the mean probability of e.
V-MoE's code has it in this scale, in which perfect balance is 1. With k = 1 it is the Switch loss; with k = 2 it
does not see second choices.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moevlm.losses.groups import Grouping, shares
from lightning_moevlm.losses.loss_input import LossInput
from lightning_moevlm.losses.weights import BalanceWeight
from lightning_moevlm.plans import RoutingPlan


@dataclass(frozen=True)
class GShard:
    """GShard's balance loss.

    Args:
        weight: as of the Switch loss, which has the same scale.
        per_modality: balance each modality apart instead of all tokens together.
    """

    weight: BalanceWeight = 1e-2
    per_modality: bool = False

    def __call__(self, inputs: LossInput) -> Tensor:
        """Return the raw loss of one plan, a scalar fp32 tensor."""
        return gshard(inputs.plan, Grouping(by_modality=self.per_modality))


def gshard(plan: RoutingPlan, grouping: Grouping = Grouping()) -> Tensor:
    """Return E * sum_e of (share of first choices x mean probability); 0 where no token is valid."""
    cell_T = grouping.group_T(plan) * plan.num_experts + plan.probs_TE.argmax(dim=-1)
    num_groups = grouping.size(plan)
    zero = torch.zeros(num_groups * plan.num_experts, dtype=torch.int64, device=cell_T.device)
    first_UE = zero.index_add(0, cell_T, plan.valid_T.to(torch.int64)).view(num_groups, plan.num_experts)
    balance_U = (shares(first_UE, plan.probs_TE) * grouping.means(plan.probs_TE, plan)).sum(dim=-1)
    return grouping.over_groups(plan.num_experts * balance_U, plan)
