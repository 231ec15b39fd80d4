"""Expert-router coupling (ERC): every expert answers strongest to the tokens that the router means for it.

    R~_i = R_i * u,  u ~ U(1 - eps_i, 1 + eps_i) in each dimension,      eps_i = ||R_i - R_j|| / (2 ||R_i||)
    M_ij = ||R~_i W_j||,      loss = 1 / E^2 * sum over i != j of  relu(M_ij - alpha M_ii) + relu(M_ji - alpha M_ii)

R_i is the router's row for expert i and stands for the tokens that it chooses, j in eps_i is the nearest other row, W_j
the first matrix of expert j (of gated experts the gate's). Coupling experts and routers (arXiv 2512.23447, equation 3).
The paper itself could not be read: the equation is as a summary and a port have it. Its alpha is 1 for 64 experts and
0.5 for 256; its weight is not in these, nor whether rows get a gradient: here they do, and eps_i has none. The cost
does not depend on the tokens: 2 E^2 D F FLOPs per layer and pass. Noise is drawn in training alone.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.schedules import Schedule
from lightning_moevlm.model.losses.loss_input import LossInput, RoutedLayer
from lightning_moevlm.model.losses.plan_loss import PlanLoss


@final
@dataclass(frozen=True)
class ExpertCoupling(PlanLoss):
    """ERC loss.

    Args:
        weight: of the loss.
        alpha: how much weaker than its own expert the other experts must answer to a row; 0 asks for orthogonal ones.

    Raises:
        UserError: a negative alpha.
    """

    weight: Schedule = 1.0
    alpha: float = 1.0
    draws: ClassVar[bool] = True
    reaches_experts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("losses.expert_coupling.alpha", self.alpha, least=0)

    def check(self, layer: RoutedLayer) -> None:
        """Refuse a router whose rows no expert could take for tokens.

        Raises:
            UserError: with what to change.
        """
        if not layer.rows_fit_experts:
            raise UserError(
                f"losses.expert_coupling runs a router's rows through the experts, and {layer.router} has no row of "
                "the model's width per expert: choose a router such as TopKRouter, or set losses.expert_coupling to "
                "null"
            )

    @property
    def adds_up(self) -> bool:
        """True: equal for every token but for the noise, so a mean over tokens."""
        return True

    def sums(self, inputs: LossInput) -> Tensor:
        """Return the layer's loss times the number of valid tokens, a scalar."""
        assert inputs.rows is not None and inputs.first_EDF is not None, "checked"
        rows_ED = inputs.rows
        if inputs.training:
            rows_ED = rows_ED * draw_noise(rows_ED.detach())
        return couple(rows_ED, inputs.first_EDF, self.alpha) * inputs.plan.valid_T.sum()


def noise_bound(rows_ED: Tensor) -> Tensor:
    """Return eps of each row, (E,): half its distance to the nearest other row, in units of its length; 0 for a row of
    length 0, and without another row.
    """
    num_rows = rows_ED.shape[0]
    if num_rows < 2:
        return rows_ED.new_zeros(num_rows)
    itself = torch.eye(num_rows, dtype=torch.bool, device=rows_ED.device)
    nearest_E = torch.cdist(rows_ED, rows_ED).masked_fill(itself, torch.inf).amin(dim=1)
    length_E = rows_ED.norm(dim=1)
    return torch.where(length_E > 0, nearest_E / (2 * length_E.clamp(min=1e-20)), 0.0)


def draw_noise(rows_ED: Tensor) -> Tensor:
    """Return u, (E, D), drawn from torch's generator in fp32."""
    wide_ED = rows_ED.float()
    return 1 + (2 * torch.rand_like(wide_ED) - 1) * noise_bound(wide_ED).unsqueeze(-1)


def couple(rows_ED: Tensor, first_EDF: Tensor, alpha: float) -> Tensor:
    """Return the loss of a layer, a scalar, at least fp32."""
    wide = torch.promote_types(torch.promote_types(rows_ED.dtype, first_EDF.dtype), torch.float32)
    answer_EE = torch.linalg.vector_norm(torch.einsum("id,jdf->ijf", rows_ED.to(wide), first_EDF.to(wide)), dim=-1)
    least_E1 = alpha * answer_EE.diagonal().unsqueeze(-1)
    excess_EE = (answer_EE - least_E1).relu() + (answer_EE.t() - least_E1).relu()
    return (excess_EE.sum() - excess_EE.diagonal().sum()) / answer_EE.numel()
