"""Chooses experts by a router's earlier weights, while the current ones weigh them.

    experts = choices of the router with earlier parameters and balancing state, on the current tokens
    weights = those of the current router at these experts, so its gradient goes on

The earlier router runs as in evaluation, without noise and without gradient. It costs the routing's matrix products
once more, and a copy of the router.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_moevlm.contracts.routing_plan import PairPlan, RoutingInput
from lightning_moevlm.model.routers.choices import list_choices
from lightning_moevlm.model.routers.router import Router


class EarlierChoices:
    """The choices of a copy of a router; what a `MoEFFN` takes as its `choose`.

    Args:
        router: copied as it is now; it takes choices (`Router.takes_choices`).
    """

    def __init__(self, router: Router) -> None:
        self._router = copy.deepcopy(router).eval().requires_grad_(False)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Choose by other parameters and buffers, as `Router.state_dict` has them; they are copied."""
        self._router.load_state_dict(dict(state))

    def __call__(self, inputs: RoutingInput) -> Tensor:
        """Return the experts of each token, int64 (T, K), the best first."""
        with torch.no_grad():
            plan = self._router(inputs)
        assert isinstance(plan, PairPlan)
        return list_choices(plan)
