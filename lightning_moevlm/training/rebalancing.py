"""Routers that balance themselves: what they are told, and when.

Counts are of the router's own choices, before capacity, summed over the micro-batches and ranks of one optimiser step;
`Router.rebalance` is called once per step, after the update, with the counts of that step.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lightning_moevlm.layers import MoEFFN
from lightning_moevlm.models import Backbone
from lightning_moevlm.records import NamedPlan
from lightning_moevlm.routers import Router


class LoadCounter:
    """Chosen pairs per expert, by layer, since the last `rebalance`."""

    def __init__(self) -> None:
        self._load_E: dict[str, Tensor] = {}

    def add(self, plans: Iterable[NamedPlan]) -> None:
        """Count the plans of one micro-batch."""
        for named in plans:
            chosen_N = named.plan.expert_N[named.plan.chosen_N]
            load_E = torch.bincount(chosen_N, minlength=named.plan.num_experts)
            self._load_E[named.layer] = self._load_E.get(named.layer, 0) + load_E

    def rebalance(self, backbone: Backbone, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Tell every self-balancing router its counts, and start anew."""
        for path, load_E in self._load_E.items():
            layer = backbone.get_submodule(path)
            assert isinstance(layer, MoEFFN)
            layer.router.rebalance(sum_over_ranks(load_E))
        self._load_E.clear()


def balances_itself(backbone: Backbone) -> Sequence[Router]:
    """Return the routers with balancing state of their own; without any, nothing need be counted."""
    layers = (module for module in backbone.modules() if isinstance(module, MoEFFN))
    return [layer.router for layer in layers if type(layer.router).rebalance is not Router.rebalance]
