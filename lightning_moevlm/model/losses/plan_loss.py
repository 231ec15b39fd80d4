"""A routing loss in two parts: sums over tokens, which add up over batches, and the value of these sums.

    loss = value(sums, size),    sums and sizes of parts of a batch add up to those of the whole

So the loss of a whole evaluation is one value and does not depend on the batches. In training the sums of other
micro-batches are unknown, but the size of the whole step is known. A loss whose value is linear in the sums (`adds_up`)
is divided by that size, and its gradient over micro-batches and ranks is that of the joined batch. Any other loss is
the mean over micro-batches, each of which is balanced.

A loss with an option of its own name is `@final`: the command line then takes its fields, and needs no class_path.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from lightning_moevlm.contracts.step_records import PlanSize
from lightning_moevlm.model.losses.groups import Grouping, size_of
from lightning_moevlm.model.losses.loss_input import LossInput


class PlanLoss(ABC):
    """A loss on the plan of one layer and forward pass.

    draws: it draws random numbers in training, so that its value is another one each time.
    reaches_experts: it is computed through the experts' weights too, and trains them.
    joins_layers: its value is that of the sums over all layers of a pass, not the mean of their values. Such a loss
        does not add up.
    """

    draws: ClassVar[bool] = False
    reaches_experts: ClassVar[bool] = False
    joins_layers: ClassVar[bool] = False

    @property
    def adds_up(self) -> bool:
        """True if the value is linear in the sums, given the size."""
        return False

    @abstractmethod
    def sums(self, inputs: LossInput) -> Tensor | None:
        """Return sums over the plan's tokens, of a shape independent of the batch; None if undefined here."""

    def value(self, sums: Tensor, size: PlanSize) -> Tensor:
        """Return the raw loss, a scalar of the sums' dtype, 0 where the size is 0: here the mean over valid tokens."""
        return sums / size.tokens_A.sum().clamp(min=1)

    def __call__(self, inputs: LossInput) -> Tensor | None:
        """Return the raw loss of one plan by itself, a scalar fp32 tensor; None if undefined here."""
        sums = self.sums(inputs)
        return None if sums is None else self.value(sums, size_of(inputs.plan))


class ModalityLoss(PlanLoss):
    """A loss over all tokens of a plan, or averaged over its modalities.

    per_modality: whether the modalities are apart.
    """

    per_modality: bool

    @property
    def grouping(self) -> Grouping:
        """The groups of tokens."""
        return Grouping(by_modality=self.per_modality)
