"""Load-balancing loss of Switch Transformers (arXiv 2101.03961, equations 4 to 6).

    loss = E * sum_e f_e P_e,   f_e = share of routed pairs sent to e,   P_e = mean probability of e over tokens

f counts the router's choices before capacity drops any, and carries no gradient: it flows through P alone. The value
is 1 under perfect balance, but 1 is not the minimum of the expression as a plain function (f and P may be disjoint).

Scope is what f and P are taken over:

    sequence      both over each sequence alone; DeepSeek-V3's, which leaves its bias out, is `SequenceBalance`
    micro_batch   both over the tokens of one forward pass on one device
    global        f over all ranks, forward passes and micro-batches of the optimiser step so far, P as above
                  (arXiv 2501.11873): the larger the balance batch, the freer single batches are to specialise

Each can be taken per modality: the balance of a pooled batch hides the collapse of its smaller modality (LIMoE, arXiv
2206.02770). Or of one modality alone: LTDR balances text and leaves images free, whose tokens are long-tailed (arXiv
2507.01351, equation 10). P is a mean over the tokens of the whole step, so that over ranks the gradient is that of
their joined batch. Over micro-batches it is so but for f: an earlier micro-batch does not know the counts of later
ones, the last one knows them all.
"""

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import Modality, PairPlan, RoutingPlan
from lightning_moevlm.contracts.step_records import PlanSize
from lightning_moevlm.model.losses.groups import Grouping, shares
from lightning_moevlm.model.losses.loss_input import LossInput
from lightning_moevlm.model.losses.plan_loss import PlanLoss
from lightning_moevlm.model.losses.weights import BalanceWeight

Scope = Literal["sequence", "micro_batch", "global"]


@final
@dataclass(frozen=True)
class LoadBalance(PlanLoss):
    """Switch load-balancing loss.

    Args:
        weight: Switch uses 1e-2, swept from 1e-5 to 1e-1.
        scope: tokens over which the load is taken. global exchanges counts between ranks once per micro-batch; in
            evaluation and for routers of soft slots it acts as micro_batch.
        per_modality: balance each modality apart instead of all tokens together.
        only: balance the tokens of this modality alone; null balances all.

    Raises:
        UserError: only together with per_modality.
    """

    weight: BalanceWeight = 1e-2
    scope: Scope = "micro_batch"
    per_modality: bool = False
    only: Literal["image", "text"] | None = None

    def __post_init__(self) -> None:
        if self.only is not None and self.per_modality:
            raise UserError(
                f"losses.load_balance.only is {self.only}, and per_modality balances both: set only to null or "
                "per_modality to false"
            )

    @property
    def adds_up(self) -> bool:
        """True if f is fixed: of a sequence it lies in one batch, the global one is equal on all ranks."""
        return self.scope != "micro_batch"

    def sums(self, inputs: LossInput) -> Tensor:
        """Return choices and probabilities of each group, (2, U, E); of sequences the sum of their losses, a scalar."""
        plan, grouping = inputs.plan, self._grouping
        if self.only is not None:
            plan = select_tokens(plan, Modality[self.only.upper()])
        if self.scope == "sequence":
            return sum_over_sequences(plan.chosen_loads(grouping.group_T(plan), grouping.size(plan)), plan, grouping)
        if inputs.counts is None or self.scope == "micro_batch":
            choices_UE = plan.chosen_loads(grouping.group_T(plan), grouping.size(plan))
        else:
            chosen_AE = inputs.counts.chosen_AE
            if self.only is not None:
                chosen_AE = chosen_AE[int(Modality[self.only.upper()])].unsqueeze(0)
            choices_UE = chosen_AE if self.per_modality else chosen_AE.sum(dim=0, keepdim=True)
        return torch.stack([choices_UE.to(plan.probs_TE.dtype), grouping.sums(plan.probs_TE, plan)])

    def value(self, sums: Tensor, size: PlanSize) -> Tensor:
        """Return E * sum_e f_e P_e, averaged over groups."""
        if self.only is not None:
            size = size.select((Modality[self.only.upper()],))
        if self.scope == "sequence":
            return sums / self._grouping.num_sequences(size).clamp(min=1)
        return balance(sums[0], sums[1], self._grouping, size)

    @property
    def _grouping(self) -> Grouping:
        return Grouping(self.scope == "sequence", self.per_modality)


def select_tokens(plan: RoutingPlan, modality: Modality) -> RoutingPlan:
    """Return the plan with the tokens of one modality alone; the others are as padding, and choose nothing."""
    valid_T = plan.valid_T & (plan.modality_T == int(modality))
    if not isinstance(plan, PairPlan):
        return plan._replace(valid_T=valid_T)
    mine_N = valid_T[plan.token_N]
    return plan._replace(valid_T=valid_T, chosen_N=plan.chosen_N & mine_N, kept_N=plan.kept_N & mine_N)


def balance(choices_UE: Tensor, prob_sums_UE: Tensor, grouping: Grouping, size: PlanSize) -> Tensor:
    """Return E * sum_e f_e P_e, averaged over groups, with f the share of an expert in its group's choices."""
    f_UE, mean_prob_UE = shares(choices_UE, prob_sums_UE), grouping.means(prob_sums_UE, size)
    return grouping.over_groups(choices_UE.shape[1] * (f_UE * mean_prob_UE).sum(dim=-1), size)


def sum_over_sequences(choices_UE: Tensor, plan: RoutingPlan, grouping: Grouping) -> Tensor:
    """Return the sum over sequences of E * sum_e f_e P_e, a scalar; choices: of each sequence, (U, E)."""
    num_U1 = grouping.tokens_in_sequences(plan).unsqueeze(-1)
    mean_prob_UE = grouping.sums(plan.probs_TE, plan) / num_U1.clamp(min=1)
    balance_U1 = (shares(choices_UE, plan.probs_TE) * mean_prob_UE).sum(dim=-1, keepdim=True)
    return (plan.num_experts * balance_U1 * (num_U1 > 0)).sum()
