"""Routers that balance themselves: what they are told, and when.

Counts are of the router's own choices, before capacity, summed over the micro-batches and ranks of one optimiser step;
`Router.rebalance` is called once per step, after the update, with the counts of that step.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lightning_moevlm.layers import MoEFFN
from lightning_moevlm.models import Backbone
from lightning_moevlm.plans import Modality
from lightning_moevlm.records import NamedPlan
from lightning_moevlm.routers import Router


class LoadCounter:
    """Chosen pairs per modality and expert, by layer, since the last `rebalance`."""

    def __init__(self) -> None:
        self._load_AE: dict[str, Tensor] = {}

    def add(self, plans: Iterable[NamedPlan]) -> None:
        """Count the plans of one micro-batch."""
        for named in plans:
            plan = named.plan
            load_AE = torch.stack([plan.chosen_load(plan.valid_T & (plan.modality_T == each)) for each in Modality])
            self._load_AE[named.layer] = self._load_AE.get(named.layer, 0) + load_AE

    def rebalance(self, backbone: Backbone, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Tell every self-balancing router its counts, and start anew."""
        for path, load_AE in self._load_AE.items():
            layer = backbone.get_submodule(path)
            assert isinstance(layer, MoEFFN)
            layer.router.rebalance(sum_over_ranks(load_AE))
        self._load_AE.clear()


def balances_itself(backbone: Backbone) -> Sequence[Router]:
    """Return the routers with balancing state of their own; without any, nothing need be counted."""
    layers = (module for module in backbone.modules() if isinstance(module, MoEFFN))
    return [layer.router for layer in layers if type(layer.router).rebalance is not Router.rebalance]
