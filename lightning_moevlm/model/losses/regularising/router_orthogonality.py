"""Orthogonality of router rows: experts should have different directions.

    loss = mean over pairs e != f of  cos(w_e, w_f)^2,      w_e = the vector that scores tokens for expert e

Rows that point the same way choose the same tokens; LongCat-Flash (arXiv 2509.01322) watches their mean cosine,
because it rises where a balance loss outweighs the task. 0 is reached only with at least as many dimensions as rows:
with d < E dimensions the least value is (E - d) / (d (E - 1)), that of a tight frame (Welch's bound).
"""

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.schedules import Schedule
from lightning_moevlm.model.losses.loss_input import LossInput, RoutedLayer
from lightning_moevlm.model.losses.plan_loss import PlanLoss


@final
@dataclass(frozen=True)
class RouterOrthogonality(PlanLoss):
    """Mean squared cosine between the rows of a router.

    Args:
        weight: of the loss.
    """

    weight: Schedule = 1e-3

    def check(self, layer: RoutedLayer) -> None:
        """Refuse a router without rows.

        Raises:
            UserError: with what to change.
        """
        if not layer.has_rows:
            raise UserError(
                f"losses.router_orthogonality compares the rows of a router, and {layer.router} has none: choose one "
                "that scores tokens with learned rows, such as TopKRouter, or set losses.router_orthogonality to null"
            )

    @property
    def adds_up(self) -> bool:
        """True: equal for every token, so a mean over tokens."""
        return True

    def sums(self, inputs: LossInput) -> Tensor:
        """Return the layer's loss times the number of valid tokens, a scalar."""
        assert inputs.rows is not None, "checked"
        return router_orthogonality(inputs.rows) * inputs.plan.valid_T.sum()


def router_orthogonality(rows_ED: Tensor) -> Tensor:
    """Return the mean squared cosine over pairs of different rows; 0 for a single row, and for rows that are 0."""
    num_rows = rows_ED.shape[0]
    # in fp32 at least: a cosine in bf16 could not tell 0.99 from 1
    unit_ED = F.normalize(rows_ED.to(torch.promote_types(rows_ED.dtype, torch.float32)), dim=-1)
    squared_EE = (unit_ED @ unit_ED.t()).square()
    return (squared_EE.sum() - squared_EE.diagonal().sum()) / max(1, num_rows * (num_rows - 1))
