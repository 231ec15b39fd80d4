"""Importance loss: experts should receive the same total gate weight.

    loss = CV^2(I) = variance(I) / mean(I)^2,   I_e = sum over tokens of p_e

Shazeer et al. 2017 (arXiv 1701.06538, equation 6). V-MoE (arXiv 2106.05974) and VL-MoE (arXiv 2303.07226, appendix)
pair it with the load loss, each at half the weight.
"""

from dataclasses import dataclass

from torch import Tensor

from lightning_moevlm.plans import RoutingPlan


@dataclass(frozen=True)
class Importance:
    """Importance loss.

    Args:
        weight: V-MoE uses 5e-3.
    """

    weight: float = 5e-3

    def __call__(self, plan: RoutingPlan) -> Tensor:
        """Return the raw loss of one plan, a scalar fp32 tensor."""
        return importance(plan)


def importance(plan: RoutingPlan) -> Tensor:
    """Return the squared coefficient of variation of summed probabilities; 0 where no token is valid."""
    total_E = (plan.probs_TE * plan.valid_T.unsqueeze(-1)).sum(dim=0)
    # the square is taken before any root, so the gradient at perfect balance is 0 and not NaN
    return (total_E - total_E.mean()).square().mean() / total_E.mean().square().clamp(min=1e-20)
