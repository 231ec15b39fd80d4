"""Router z-loss of ST-MoE (arXiv 2202.08906, equation 5): keeps router logits small, so that softmax stays exact.

loss = mean over tokens of (logsumexp over experts of the logits)^2
"""

from dataclasses import dataclass

from torch import Tensor

from lightning_moevlm.losses.loss_input import LossInput
from lightning_moevlm.plans import RoutingPlan
from lightning_moevlm.schedules import Schedule


@dataclass(frozen=True)
class RouterZ:
    """Router z-loss.

    Args:
        weight: ST-MoE uses 1e-3.
    """

    weight: Schedule = 1e-3

    def __call__(self, inputs: LossInput) -> Tensor:
        """Return the raw loss of one plan, a scalar fp32 tensor."""
        return router_z(inputs.plan)


def router_z(plan: RoutingPlan) -> Tensor:
    """Return the mean squared logsumexp over valid tokens, a scalar fp32 tensor; 0 where no token is valid."""
    squared_T = plan.logits_TE.logsumexp(dim=-1).square() * plan.valid_T
    return squared_T.sum() / plan.valid_T.sum().clamp(min=1)
