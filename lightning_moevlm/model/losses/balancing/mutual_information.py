"""Mutual information of tokens and experts: each token sure, all tokens together spread.

    loss = -I(token; expert) = mean over tokens of H(p_x) - H(mean over tokens of p_x)        in [-ln E, 0], in nats

ModuleFormer (arXiv 2306.04640) maximises it over tokens, Mod-Squad (arXiv 2212.08066) over tasks. It is LIMoE's
local plus global entropy loss with equal weights and no threshold, less a constant.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_moevlm.contracts.step_records import PlanSize
from lightning_moevlm.model.losses.balancing.modality_entropy import entropy
from lightning_moevlm.model.losses.loss_input import LossInput
from lightning_moevlm.model.losses.plan_loss import ModalityLoss
from lightning_moevlm.model.losses.weights import BalanceWeight


@final
@dataclass(frozen=True)
class MutualInformation(ModalityLoss):
    """Minus the mutual information.

    Args:
        weight: as of the entropy losses, whose sum it is.
        per_modality: of each modality's tokens apart instead of all together.
    """

    weight: BalanceWeight = 1e-2
    per_modality: bool = False

    def sums(self, inputs: LossInput) -> Tensor:
        """Return the probabilities of each group and last the entropy of its tokens, (U, E + 1)."""
        probs_TE = inputs.plan.probs_TE
        return self.grouping.sums(torch.cat([probs_TE, entropy(probs_TE).unsqueeze(-1)], dim=-1), inputs.plan)

    def value(self, sums: Tensor, size: PlanSize) -> Tensor:
        """Return minus the mutual information, averaged over groups."""
        means = self.grouping.means(sums, size)
        return self.grouping.over_groups(means[:, -1] - entropy(means[:, :-1]), size)
