"""Load loss: experts should be chosen equally often, made smooth by the router's own noise.

    loss = CV^2(L),   L_e = sum over tokens of P_e,   P_e = Phi((logit_e - threshold) / sigma_e)

P_e is the probability that e would be among the k chosen if its noise were drawn once more; the threshold is the
k-th largest noisy logit, Phi the normal distribution function. Shazeer et al. 2017 (arXiv 1701.06538, equations 8 to
11; their threshold leaves e itself out), in the form of V-MoE (arXiv 2106.05974, appendix A). Without noise it is
undefined: a step function has no gradient. It is therefore left out of evaluation.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import PairPlan
from lightning_moevlm.contracts.step_records import PlanSize
from lightning_moevlm.model.losses.balancing.importance import squared_variation
from lightning_moevlm.model.losses.loss_input import LossInput, RoutedLayer
from lightning_moevlm.model.losses.plan_loss import ModalityLoss
from lightning_moevlm.model.losses.weights import BalanceWeight


@final
@dataclass(frozen=True)
class Load(ModalityLoss):
    """Load loss; needs a router that adds noise while training.

    Args:
        weight: V-MoE uses 5e-3, beside as much importance loss.
        per_modality: balance each modality apart instead of all tokens together.
    """

    weight: BalanceWeight = 5e-3
    per_modality: bool = False

    def check(self, layer: RoutedLayer) -> None:
        """Refuse a router without noise.

        Raises:
            UserError: with what to change.
        """
        if not layer.adds_noise:
            raise UserError(
                f"losses.load needs the noise of the router, and {layer.router} adds none: choose NoisyTopKRouter, or "
                "set losses.load to null (losses.importance and losses.load_balance need no noise)"
            )

    def sums(self, inputs: LossInput) -> Tensor | None:
        """Return the chances of each group, (U, E); None in evaluation."""
        if not inputs.training:
            return None
        assert isinstance(inputs.plan, PairPlan), "checked"
        return self.grouping.sums(chances(inputs.plan), inputs.plan)

    def value(self, sums: Tensor, size: PlanSize) -> Tensor:
        """Return their squared coefficient of variation, averaged over groups."""
        return self.grouping.over_groups(squared_variation(self.grouping.means(sums, size)), size)


def chances(plan: PairPlan) -> Tensor:
    """Return the probability that an expert would be chosen if its noise were drawn once more, (T, E)."""
    assert plan.noisy_logits_TE is not None and plan.noise_std_TE is not None, "a plan of a noisy router"
    num_choices = plan.token_N.shape[0] // max(1, plan.num_tokens)
    threshold_T1 = plan.noisy_logits_TE.topk(max(1, num_choices), dim=-1).values[:, -1:]
    # the floor keeps a router whose noise vanishes from dividing by 0
    return torch.special.ndtr((plan.logits_TE - threshold_T1) / plan.noise_std_TE.clamp(min=1e-6))
