"""Sequence-wise auxiliary loss of DeepSeek-V3 (arXiv 2412.19437): no single sequence leans on few experts.

    loss = mean over sequences of  E * sum_e f_e P_e        f, P over the tokens of that sequence

It stands beside another balance: DeepSeek-V3 balances the batch by a bias and adds this with a tiny weight. f counts
the experts that a token scores highest, as many as it took, and P is of the normalised scores: the paper leaves the
bias out of both. `LoadBalance` with scope "sequence" counts what was chosen, bias and all; without one they are the
same.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_moevlm.contracts.routing_plan import MixPlan
from lightning_moevlm.contracts.step_records import PlanSize
from lightning_moevlm.model.losses.balancing.load_balance import sum_over_sequences
from lightning_moevlm.model.losses.groups import Grouping
from lightning_moevlm.model.losses.loss_input import LossInput
from lightning_moevlm.model.losses.plan_loss import PlanLoss
from lightning_moevlm.model.losses.weights import BalanceWeight


@final
@dataclass(frozen=True)
class SequenceBalance(PlanLoss):
    """Balance within each sequence.

    Args:
        weight: DeepSeek-V3 uses 1e-4.
        per_modality: balance the image and the text of a sequence apart.
    """

    weight: BalanceWeight = 1e-4
    per_modality: bool = False

    @property
    def adds_up(self) -> bool:
        """True: a mean over sequences."""
        return True

    def sums(self, inputs: LossInput) -> Tensor:
        """Return the sum over sequences, a scalar."""
        plan, grouping = inputs.plan, self._grouping
        if isinstance(plan, MixPlan):
            return sum_over_sequences(plan.chosen_loads(grouping.group_T(plan), grouping.size(plan)), plan, grouping)
        num_chosen_T = torch.zeros_like(plan.modality_T).index_add(0, plan.token_N, plan.chosen_N.to(torch.int64))
        # a token's rank of each expert: where the expert stands among the scores in falling order
        rank_TE = plan.probs_TE.detach().argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        highest_TE = (rank_TE < num_chosen_T.unsqueeze(-1)).to(plan.probs_TE.dtype)
        return sum_over_sequences(grouping.sums(highest_TE, plan), plan, grouping)

    def value(self, sums: Tensor, size: PlanSize) -> Tensor:
        """Return the mean over sequences."""
        return sums / self._grouping.num_sequences(size).clamp(min=1)

    @property
    def _grouping(self) -> Grouping:
        return Grouping(by_sequence=True, by_modality=self.per_modality)
