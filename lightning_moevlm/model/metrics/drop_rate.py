"""Share of routed pairs that capacity drops in evaluation, by block and modality, over all batches and ranks.

drop rate = 1 - kept pairs / chosen pairs
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.routing_plan import MixPlan, Modality
from lightning_moevlm.contracts.step_records import ObjectiveOutput
from lightning_moevlm.model.metrics.measure import Measure, Measured
from lightning_moevlm.model.metrics.running_sums import RunningSums


class Place(NamedTuple):
    """The block and modality of a rate."""

    block: int
    modality: Modality


class DropRates(Measure):
    """Counts pairs of some layers; those of other layers and of soft slots are passed over.

    Args:
        layers: paths of MoE layers in the backbone.
    """

    def __init__(self, layers: Iterable[str]) -> None:
        self._layers = frozenset(layers)
        self._pairs = RunningSums[Place]()  # chosen, kept

    def update(self, output: ObjectiveOutput) -> None:
        """Add the plans of one batch."""
        for named in output.plans:
            plan = named.plan
            if named.layer not in self._layers or isinstance(plan, MixPlan):
                continue
            chosen_A = plan.chosen_loads(plan.modality_T, len(Modality)).sum(dim=1)
            kept_A = plan.kept_loads(plan.modality_T, len(Modality)).sum(dim=1)
            for modality in Modality:
                self._pairs.add(Place(named.block, modality), torch.stack([chosen_A[modality], kept_A[modality]]))

    def rates(self) -> dict[Place, float]:
        """Return the rate of every block and modality that had a pair; all ranks must ask together."""
        counted = {place: numbers.tolist() for place, numbers in sorted(self._pairs.totals().items())}
        return {place: 1 - kept / chosen for place, (chosen, kept) in counted.items() if chosen}

    def compute(self, stage: str) -> Measured:
        """Return the rates under their keys."""
        family = metric_keys.EVAL_DROP_RATE
        return Measured(
            {
                family.key(stage=stage, block=block, modality=modality.label): rate
                for (block, modality), rate in self.rates().items()
            }
        )

    def reset(self) -> None:
        """Forget all batches."""
        self._pairs.reset()
