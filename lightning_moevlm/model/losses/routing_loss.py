"""The base class of routing losses from other packages; `model.losses.others` takes them by class_path and a name."""

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from lightning_moevlm.model.losses.loss_input import LossInput
from lightning_moevlm.model.losses.plan_loss import PlanLoss
from lightning_moevlm.model.losses.weights import Weight


class RoutingLoss(PlanLoss):
    """A loss on the plans of MoE layers: inherit in a frozen dataclass with options as fields, `weight` among them.

    weight: a number, a ramp over steps or an adaptive weight.
    balances: whether it spreads tokens over experts, so that it counts as balance in R_g, the share of the gradient.

    In evaluation it is a mean over tokens. If yours is not, override `sums` and `value`; if it is, `adds_up` may be
    true, see `PlanLoss`.
    """

    weight: Weight
    balances: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, inputs: LossInput) -> Tensor | None:
        """Return the raw loss of one plan, a scalar fp32 tensor, 0 where no token is valid; None if undefined here.

        The caller takes the mean over plans, so its scale must not depend on the number of tokens.
        """

    def sums(self, inputs: LossInput) -> Tensor | None:
        """Return the loss times the number of valid tokens, a scalar."""
        value = self(inputs)
        return None if value is None else value * inputs.plan.valid_T.sum()
