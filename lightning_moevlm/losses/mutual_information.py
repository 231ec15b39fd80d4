"""Mutual information of tokens and experts: each token sure, all tokens together spread.

    loss = -I(token; expert) = mean over tokens of H(p_x) - H(mean over tokens of p_x)        in [-ln E, 0], in nats

ModuleFormer (arXiv 2306.04640) maximises it over tokens, Mod-Squad (arXiv 2212.08066) over tasks. It is LIMoE's
local plus global entropy loss with equal weights and no threshold, less a constant.
"""

from dataclasses import dataclass

from torch import Tensor

from lightning_moevlm.losses.groups import Grouping
from lightning_moevlm.losses.loss_input import LossInput
from lightning_moevlm.losses.modality_entropy import entropy
from lightning_moevlm.losses.weights import BalanceWeight
from lightning_moevlm.plans import RoutingPlan


@dataclass(frozen=True)
class MutualInformation:
    """Minus the mutual information.

    Args:
        weight: as of the entropy losses, whose sum it is.
        per_modality: of each modality's tokens apart instead of all together.
    """

    weight: BalanceWeight = 1e-2
    per_modality: bool = False

    def __call__(self, inputs: LossInput) -> Tensor:
        """Return the raw loss of one plan in nats, a scalar fp32 tensor."""
        return mutual_information(inputs.plan, Grouping(by_modality=self.per_modality))


def mutual_information(plan: RoutingPlan, grouping: Grouping = Grouping()) -> Tensor:
    """Return minus the mutual information in nats; 0 where no token is valid."""
    token_U = grouping.means(entropy(plan.probs_TE).unsqueeze(-1), plan).squeeze(-1)
    return grouping.over_groups(token_U - entropy(grouping.means(plan.probs_TE, plan)), plan)
