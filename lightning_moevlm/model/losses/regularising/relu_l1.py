"""L1 loss of ReLU routing: the only thing that makes it sparse, and with load weights also what balances it.

    loss = mean over tokens of  sum_e f_e w_e,    w_e = weight of the pair (token, e),   f_e = E * load_e / sum of loads

ReMoE (arXiv 2412.14711, adaptive L1 with load balancing). f weights an expert by its load, without gradient, so busy
experts are pushed harder; even loads give f = 1, the plain L1 norm. The paper divides loads by k T, which is their sum
once the aim is met. Its weight is adaptive: it grows by 1.2 per step while more than k experts are active and shrinks
while fewer are. It is the one loss that reads weights: a router that scales them by 2.5 scales it too.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import PairPlan
from lightning_moevlm.contracts.step_records import PlanSize
from lightning_moevlm.model.losses.groups import Grouping, shares
from lightning_moevlm.model.losses.loss_input import LossInput, RoutedLayer
from lightning_moevlm.model.losses.plan_loss import PlanLoss
from lightning_moevlm.model.losses.weights import BySparsity, SparsityWeight


@final
@dataclass(frozen=True)
class ReLUL1(PlanLoss):
    """L1 loss on the weights of routed pairs.

    Args:
        weight: adaptive as in ReMoE, or fixed.
        load_weighted: push busy experts harder.
    """

    weight: SparsityWeight = BySparsity()
    load_weighted: bool = True

    def check(self, layer: RoutedLayer) -> None:
        """Refuse a router of soft slots.

        Raises:
            UserError: with what to change.
        """
        if layer.mixes:
            raise UserError(
                f"losses.relu_l1 acts on the weights of chosen experts, and {layer.router} chooses none: use "
                "ReLURouter, or set losses.relu_l1 to null"
            )

    @property
    def adds_up(self) -> bool:
        """True without loads, which are those of the batch."""
        return not self.load_weighted

    def sums(self, inputs: LossInput) -> Tensor:
        """Return the load of every expert and the weights of its pairs, (2, E)."""
        plan, whole = inputs.plan, Grouping()
        assert isinstance(plan, PairPlan), "checked"
        weight_N = plan.weight_N * plan.chosen_N
        # a cell for every pair, so that floats are added up in the same order each time
        weight_TE = torch.zeros_like(plan.probs_TE.flatten(), dtype=weight_N.dtype).index_add(
            0, plan.token_N * plan.num_experts + plan.expert_N, weight_N
        )
        load_1E = plan.chosen_loads().to(weight_N.dtype)
        return torch.cat([load_1E, whole.sums(weight_TE.view_as(plan.probs_TE), plan)])

    def value(self, sums: Tensor, size: PlanSize) -> Tensor:
        """Return the mean over tokens of their weights' sum, by load if load_weighted."""
        load_E, weight_E = sums.unbind()
        if self.load_weighted:
            weight_E = weight_E * (len(load_E) * shares(load_E.unsqueeze(0), weight_E)[0])
        return weight_E.sum() / size.tokens_A.sum().clamp(min=1)
