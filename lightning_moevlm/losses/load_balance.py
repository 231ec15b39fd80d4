"""Load-balancing loss of Switch Transformers (arXiv 2101.03961, equations 4 to 6).

    loss = E * sum_e f_e P_e,   f_e = share of routed pairs sent to e,   P_e = mean probability of e over tokens

f counts the router's choices before capacity drops any, and carries no gradient: it flows through P alone. The value
is 1 under perfect balance, but 1 is no minimum of the expression as a plain function (f and P may be disjoint).

Scope is what f and P are taken over:

    sequence      both over each sequence alone; DeepSeek-V3's, which leaves its bias out, is `SequenceBalance`
    micro_batch   both over the tokens of one forward pass on one device
    global        f over all ranks, forward passes and micro-batches of the optimiser step so far, P as above
                  (arXiv 2501.11873): the larger the balance batch, the freer single batches are to specialise

Each can be taken per modality: the balance of a pooled batch hides the collapse of its smaller modality (LIMoE, arXiv
2206.02770). An earlier micro-batch of a step does not know the counts of later ones; the last one knows them all.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_moevlm.losses.groups import Grouping, shares
from lightning_moevlm.losses.loss_input import LayerCounts, LossInput
from lightning_moevlm.losses.weights import BalanceWeight
from lightning_moevlm.plans import RoutingPlan

Scope = Literal["sequence", "micro_batch", "global"]


@dataclass(frozen=True)
class LoadBalance:
    """Switch load-balancing loss.

    Args:
        weight: Switch uses 1e-2, swept from 1e-5 to 1e-1.
        scope: over which the load is taken. Global costs one exchange of counts between ranks per micro-batch; it is
            micro_batch in evaluation and for routers of soft slots, which choose nothing.
        per_modality: balance each modality apart instead of all tokens together.
    """

    weight: BalanceWeight = 1e-2
    scope: Scope = "micro_batch"
    per_modality: bool = False

    def __call__(self, inputs: LossInput) -> Tensor:
        """Return the raw loss of one plan, a scalar fp32 tensor."""
        counts = inputs.counts if self.scope == "global" else None
        return load_balance(inputs.plan, Grouping(self.scope == "sequence", self.per_modality), counts)


def load_balance(plan: RoutingPlan, grouping: Grouping = Grouping(), counts: LayerCounts | None = None) -> Tensor:
    """Return E * sum_e f_e P_e over each group's valid tokens, averaged over groups: a scalar fp32 tensor.

    counts: where f is taken from instead of the plan itself; then groups are no sequences. 0 where no token is valid.
    """
    if counts is None:
        choices_UE = plan.chosen_by(grouping.group_T(plan), grouping.size(plan))
    else:
        assert not grouping.by_sequence, "counts of a layer know no sequences"
        choices_UE = counts.chosen_AE if grouping.by_modality else counts.chosen_AE.sum(dim=0, keepdim=True)
    return balance(plan, grouping, choices_UE)


def balance(plan: RoutingPlan, grouping: Grouping, choices_UE: Tensor) -> Tensor:
    """Return E * sum_e f_e P_e, averaged over groups, with f the share of an expert in its group's choices (U, E)."""
    f_UE, mean_prob_UE = shares(choices_UE, plan.probs_TE), grouping.means(plan.probs_TE, plan)
    return grouping.over_groups(plan.num_experts * (f_UE * mean_prob_UE).sum(dim=-1), plan)
