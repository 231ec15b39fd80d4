"""SMEBU, soft-clamped momentum expert bias updates: gentle near balance, bounded far from it, smooth over steps.

    v_e = (mean load - load_e) / mean load,      d_e = rate * tanh(kappa v_e),  less the mean of d over experts
    m_e <- beta m_e + (1 - beta) d_e,            b_e <- b_e + m_e

Arcee Trinity Large (arXiv 2602.17004): rate 5e-4, kappa 2, beta 0.5. A sign moves every bias by the whole rate however
small the imbalance is, and so swings around the balance. The report itself could not be read; equations and constants
are those of a published derivation from it.
"""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from lightning_moevlm.common.number_checks import check_number


@final
@dataclass(frozen=True)
class SMEBU:
    """Soft-clamped momentum expert bias updates; the router's update_rate is their rate, 5e-4 in Trinity Large.

    Args:
        kappa: how soon tanh saturates; the larger, the more like the sign.
        beta: share of the momentum that stays from step to step; 0 has no memory.

    Raises:
        UserError: a value outside its range.
    """

    kappa: float = 2.0
    beta: float = 0.5

    def __post_init__(self) -> None:
        check_number("router.update.kappa", self.kappa, above=0)
        check_number("router.update.beta", self.beta, least=0, below=1)


def next_momentum(load_AE: Tensor, momentum_AE: Tensor, rate: float, rule: SMEBU) -> Tensor:
    """Return m after a step, fp32 (rows, E), which the bias moves by; load_AE: fp32, chosen pairs of each expert."""
    mean_A1 = load_AE.mean(dim=1, keepdim=True)
    violation_AE = (mean_A1 - load_AE) / mean_A1.clamp(min=1e-20)
    step_AE = rate * (rule.kappa * violation_AE).tanh()
    step_AE = step_AE - step_AE.mean(dim=1, keepdim=True)
    return rule.beta * momentum_AE + (1 - rule.beta) * step_AE
