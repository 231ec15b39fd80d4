"""L1 loss of ReLU routing: the only thing that makes it sparse, and with load weights also what balances it.

    loss = mean over tokens of  sum_e f_e w_e,    w_e = weight of the pair (token, e),   f_e = E * load_e / sum of loads

ReMoE (arXiv 2412.14711, adaptive L1 with load balancing). f weights an expert by its load, without gradient, so busy
experts are pushed harder; even loads give f = 1, the plain L1 norm. The paper divides loads by k T, which is their sum
once the aim is met. Its weight is adaptive: it grows by 1.2 per step while more than k experts are active and shrinks
while fewer are.
"""

from dataclasses import dataclass

from torch import Tensor

from lightning_moevlm.errors import UserError
from lightning_moevlm.losses.groups import Grouping, shares
from lightning_moevlm.losses.loss_input import LossInput, RoutedLayer
from lightning_moevlm.losses.weights import BySparsity, SparsityWeight
from lightning_moevlm.plans import PairPlan


@dataclass(frozen=True)
class ReLUL1:
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

    def __call__(self, inputs: LossInput) -> Tensor:
        """Return the raw loss of one plan, a scalar fp32 tensor."""
        assert isinstance(inputs.plan, PairPlan), "checked"
        return relu_l1(inputs.plan, self.load_weighted)


def relu_l1(plan: PairPlan, load_weighted: bool = True) -> Tensor:
    """Return the mean over valid tokens of their weights' sum, by load if asked; 0 where no token is valid."""
    weight_N = plan.weight_N * plan.chosen_N
    if load_weighted:
        whole = Grouping()
        load_1E = plan.chosen_by(whole.group_T(plan), 1)
        weight_N = weight_N * (plan.num_experts * shares(load_1E, weight_N))[0, plan.expert_N]
    return weight_N.sum() / plan.valid_T.sum().clamp(min=1)
