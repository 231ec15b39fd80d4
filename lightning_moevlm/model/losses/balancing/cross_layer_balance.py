"""Load-balancing loss of Hugging Face transformers (`load_balancing_loss_func`): all layers of a pass as one router.

    loss = E * sum_e f_e P_e,   f_e = choices of e / tokens,   P_e = mean probability of e

Choices, probabilities and tokens are added up over layers first, so f sums to K and the value is K under perfect
balance: a coefficient of theirs, such as `router_aux_loss_coef`, keeps its meaning. Layers that lean on different
experts cancel out, which `LoadBalance`, the mean over layers, does not let pass. f carries no gradient.

transformers divides neither by micro-batches nor by ranks where its Trainer counts items; here the loss is the mean
over both.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from lightning_moevlm.contracts.step_records import PlanSize
from lightning_moevlm.model.losses.groups import Grouping
from lightning_moevlm.model.losses.loss_input import LossInput
from lightning_moevlm.model.losses.plan_loss import PlanLoss
from lightning_moevlm.model.losses.weights import BalanceWeight


@final
@dataclass(frozen=True)
class CrossLayerBalance(PlanLoss):
    """Balance over all layers together, as transformers computes it.

    Args:
        weight: the coefficient in transformers: 1e-3 in most families, 1e-2 in OLMoE.
    """

    joins_layers: ClassVar[bool] = True
    weight: BalanceWeight = 1e-3

    def sums(self, inputs: LossInput) -> Tensor:
        """Return choices and probabilities, (2, E)."""
        plan = inputs.plan
        probs_E = Grouping().sums(plan.probs_TE, plan).squeeze(0)
        return torch.stack([plan.chosen_loads().squeeze(0).to(probs_E.dtype), probs_E])

    def value(self, sums: Tensor, size: PlanSize) -> Tensor:
        """Return E * sum_e f_e P_e."""
        f_E, mean_prob_E = sums / size.tokens_A.sum().clamp(min=1)
        return len(f_E) * (f_E * mean_prob_E).sum()
