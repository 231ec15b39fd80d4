"""Router z-loss of ST-MoE (arXiv 2202.08906, equation 5): keeps router logits small, so that softmax stays exact.

loss = mean over tokens of (logsumexp over experts of the logits)^2
"""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.schedules import Schedule
from lightning_moevlm.model.losses.loss_input import LossInput, RoutedLayer
from lightning_moevlm.model.losses.plan_loss import PlanLoss


@final
@dataclass(frozen=True)
class RouterZ(PlanLoss):
    """Router z-loss.

    Args:
        weight: ST-MoE uses 1e-3.
    """

    weight: Schedule = 1e-3

    @property
    def adds_up(self) -> bool:
        """True: a mean over tokens."""
        return True

    def check(self, layer: RoutedLayer) -> None:
        """Refuse a router that gives probabilities alone.

        Raises:
            UserError: with what to change.
        """
        if not layer.has_logits:
            raise UserError(
                "losses.router_z keeps logits small, and the router of this model gives probabilities, whose logsumexp "
                "is 0: set losses.router_z to null, or choose model.backbone.router TopKRouter"
            )

    def sums(self, inputs: LossInput) -> Tensor:
        """Return the sum of squares, a scalar."""
        plan = inputs.plan
        return (plan.logits_TE.logsumexp(dim=-1).square() * plan.valid_T).sum()
