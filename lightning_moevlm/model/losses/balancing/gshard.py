"""Balance loss of GShard (arXiv 2006.16668, algorithm 1): first choices alone, for any k.

    loss = E^2 * mean over experts of (c_e / T) m_e = E * sum_e (c_e / T) m_e

c_e counts the tokens whose largest probability is e and carries no gradient, m_e is the mean probability of e.
V-MoE's code has it in this scale, in which perfect balance is 1. With k = 1 it is the Switch loss; with k = 2 it
does not see second choices.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_moevlm.contracts.step_records import PlanSize
from lightning_moevlm.model.losses.balancing.load_balance import balance
from lightning_moevlm.model.losses.loss_input import LossInput
from lightning_moevlm.model.losses.plan_loss import ModalityLoss
from lightning_moevlm.model.losses.weights import BalanceWeight


@final
@dataclass(frozen=True)
class GShard(ModalityLoss):
    """GShard's balance loss.

    Args:
        weight: as of the Switch loss, which has the same scale.
        per_modality: balance each modality apart instead of all tokens together.
    """

    weight: BalanceWeight = 1e-2
    per_modality: bool = False

    def sums(self, inputs: LossInput) -> Tensor:
        """Return first choices and probabilities of each group, (2, U, E)."""
        plan, num_groups = inputs.plan, self.grouping.size(inputs.plan)
        cell_T, group_T = plan.probs_TE.argmax(dim=-1), self.grouping.group_T(plan)
        if group_T is not None:
            cell_T = group_T * plan.num_experts + cell_T
        zero = torch.zeros(num_groups * plan.num_experts, dtype=torch.int64, device=cell_T.device)
        first_UE = zero.index_add(0, cell_T, plan.valid_T.to(torch.int64)).view(num_groups, plan.num_experts)
        return torch.stack([first_UE.to(plan.probs_TE.dtype), self.grouping.sums(plan.probs_TE, plan)])

    def value(self, sums: Tensor, size: PlanSize) -> Tensor:
        """Return E * sum_e of share x mean, averaged over groups."""
        return balance(sums[0], sums[1], self.grouping, size)
