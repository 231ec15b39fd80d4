"""Importance loss: experts should receive the same total gate weight.

    loss = CV^2(I) = variance(I) / mean(I)^2,   I_e = sum over tokens of p_e

Shazeer et al. 2017 (arXiv 1701.06538, equation 6), which sums the weights of the chosen; here p is over all experts and
without the router's noise, as in V-MoE (arXiv 2106.05974, appendix A). V-MoE and VL-MoE (arXiv 2303.07226, appendix)
pair it with the load loss, each at half the weight.
"""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from lightning_moevlm.contracts.routing_plan import PairPlan
from lightning_moevlm.contracts.step_records import PlanSize
from lightning_moevlm.model.losses.loss_input import LossInput
from lightning_moevlm.model.losses.plan_loss import ModalityLoss
from lightning_moevlm.model.losses.weights import BalanceWeight


@final
@dataclass(frozen=True)
class Importance(ModalityLoss):
    """Importance loss.

    Args:
        weight: V-MoE uses 5e-3.
        per_modality: balance each modality apart instead of all tokens together.
    """

    weight: BalanceWeight = 5e-3
    per_modality: bool = False

    def sums(self, inputs: LossInput) -> Tensor:
        """Return the probabilities of each group, (U, E)."""
        plan = inputs.plan
        is_noisy = isinstance(plan, PairPlan) and plan.noisy_logits_TE is not None
        return self.grouping.sums(plan.logits_TE.softmax(dim=-1) if is_noisy else plan.probs_TE, plan)

    def value(self, sums: Tensor, size: PlanSize) -> Tensor:
        """Return their squared coefficient of variation, averaged over groups."""
        return self.grouping.over_groups(squared_variation(self.grouping.means(sums, size)), size)


def squared_variation(values_UE: Tensor) -> Tensor:
    """Return variance / mean^2 over experts, (U,); a factor on all values does not matter, and zeros give 0."""
    mean_U1 = values_UE.mean(dim=-1, keepdim=True)
    # the square is taken before any root, so the gradient at perfect balance is 0 and not NaN
    return (values_UE - mean_U1).square().mean(dim=-1) / mean_U1.squeeze(-1).square().clamp(min=1e-20)
