"""Load-balancing loss of Switch Transformers (arXiv 2101.03961, equations 4 to 6).

    loss = E * sum_e f_e P_e,   f_e = share of routed pairs sent to e,   P_e = mean probability of e over tokens

f counts the router's choices before capacity drops any, and carries no gradient: it flows through P alone. The value
is 1 under perfect balance, but 1 is no minimum of the expression as a plain function (f and P may be disjoint).
"""

from dataclasses import dataclass

from torch import Tensor

from lightning_moevlm.plans import RoutingPlan


@dataclass(frozen=True)
class LoadBalance:
    """Switch load-balancing loss.

    Args:
        weight: Switch uses 1e-2, swept from 1e-5 to 1e-1.
    """

    weight: float = 1e-2

    def __call__(self, plan: RoutingPlan) -> Tensor:
        """Return the raw loss of one plan, a scalar fp32 tensor."""
        return load_balance(plan)


def load_balance(plan: RoutingPlan) -> Tensor:
    """Return E * sum_e f_e P_e over valid tokens, a scalar fp32 tensor; 0 where no token is valid."""
    probs_TE = plan.probs_TE
    choices_E = plan.chosen_load(plan.valid_T).to(probs_TE.dtype)
    share_E = choices_E / choices_E.sum().clamp(min=1)
    valid_T1 = plan.valid_T.unsqueeze(-1)
    mean_prob_E = (probs_TE * valid_T1).sum(dim=0) / valid_T1.sum().clamp(min=1)
    return plan.num_experts * (share_E.detach() * mean_prob_E).sum()
