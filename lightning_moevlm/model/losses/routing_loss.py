"""What a loss on routing from elsewhere has to be; `model.losses.others` takes it by class_path, under any name."""

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from lightning_moevlm.model.losses.loss_input import LossInput
from lightning_moevlm.model.losses.plan_loss import PlanLoss
from lightning_moevlm.model.losses.weights import Weight


class RoutingLoss(PlanLoss):
    """A loss on the plans of MoE layers. A frozen dataclass below it has its options as fields, `weight` among them.

    weight: a number, a ramp over steps or an adaptive weight. balances: whether it spreads tokens over experts, so that
    it counts as balance in R_g, the share of the gradient. In evaluation it is a mean over tokens; one that is no such
    mean says what adds up over batches in `sums` and `value`, and one that is may say `adds_up`, see `PlanLoss`.
    """

    weight: Weight
    balances: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, inputs: LossInput) -> Tensor | None:
        """Return the raw loss of one plan, a scalar fp32 tensor, 0 where no token is valid; None: undefined here.

        The mean over plans is taken by the caller, so its scale must not move with the number of tokens.
        """

    def sums(self, inputs: LossInput) -> Tensor | None:
        """Return the loss for every token, a scalar."""
        value = self(inputs)
        return None if value is None else value * inputs.plan.valid_T.sum()
