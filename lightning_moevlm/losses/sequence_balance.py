"""Sequence-wise auxiliary loss of DeepSeek-V3 (arXiv 2412.19437): no single sequence leans on few experts.

    loss = mean over sequences of  E * sum_e f_e P_e        f, P over the tokens of that sequence

The sum is that of `LoadBalance` with scope "sequence"; it is a loss of its own because it stands beside another
balance: DeepSeek-V3 balances the batch by a bias and adds this with a tiny weight. P is of the normalised scores,
which is what the plans of sigmoid routers carry.
"""

from dataclasses import dataclass

from torch import Tensor

from lightning_moevlm.losses.groups import Grouping
from lightning_moevlm.losses.load_balance import load_balance
from lightning_moevlm.losses.loss_input import LossInput
from lightning_moevlm.losses.weights import BalanceWeight


@dataclass(frozen=True)
class SequenceBalance:
    """Balance within each sequence.

    Args:
        weight: DeepSeek-V3 uses 1e-4.
        per_modality: balance the image and the text of a sequence apart.
    """

    weight: BalanceWeight = 1e-4
    per_modality: bool = False

    def __call__(self, inputs: LossInput) -> Tensor:
        """Return the raw loss of one plan, a scalar fp32 tensor."""
        return load_balance(inputs.plan, Grouping(by_sequence=True, by_modality=self.per_modality))
