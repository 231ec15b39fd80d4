"""Share of routed pairs that capacity drops in evaluation, by block and modality, over all batches and ranks.

drop rate = 1 - kept pairs / chosen pairs
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_moevlm.contracts.routing_plan import MixPlan, Modality
from lightning_moevlm.contracts.step_records import NamedPlan


class Place(NamedTuple):
    """The block and modality of a rate."""

    block: int
    modality: Modality


class DropRates(Metric):
    """Counts pairs of some layers.

    Args:
        layers: paths of MoE layers in the backbone, in the same order on every rank.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    chosen_LA: Tensor
    kept_LA: Tensor
    block_L: Tensor

    def __init__(self, layers: Sequence[str]) -> None:
        super().__init__()
        self._layers = {path: index for index, path in enumerate(layers)}
        counts_LA = torch.zeros(len(layers), len(Modality), dtype=torch.int64)
        self.add_state("chosen_LA", default=counts_LA, dist_reduce_fx="sum")
        self.add_state("kept_LA", default=counts_LA.clone(), dist_reduce_fx="sum")
        # a state, because a rank whose samples had no text has not seen the plans of text layers
        self.add_state("block_L", default=torch.full((len(layers),), -1), dist_reduce_fx="max")

    def update(self, plans: Iterable[NamedPlan]) -> None:
        """Add the plans of one batch; those of other layers and of soft slots are passed over."""
        for named in plans:
            layer, plan = self._layers.get(named.layer), named.plan
            if layer is None or isinstance(plan, MixPlan):
                continue
            self.chosen_LA[layer] += plan.chosen_loads(plan.modality_T, len(Modality)).sum(dim=1)
            self.kept_LA[layer] += plan.kept_loads(plan.modality_T, len(Modality)).sum(dim=1)
            self.block_L[layer] = named.block

    def compute(self) -> dict[Place, float]:
        """Return the rate of every block and modality that had a pair."""
        rates: dict[Place, float] = {}
        blocks = self.block_L.tolist()
        for block in sorted({block for block in blocks if block >= 0}):
            here_L = self.block_L == block
            for modality, chosen, kept in zip(
                Modality,
                self.chosen_LA[here_L].sum(dim=0).tolist(),
                self.kept_LA[here_L].sum(dim=0).tolist(),
                strict=True,
            ):
                if chosen:
                    rates[Place(block, modality)] = 1 - kept / chosen
        return rates
