"""How much an optimiser step predicts and routes, over its micro-batches and ranks, known before any of it is computed.

A mean over the step is a sum divided by a number that no micro-batch knows by itself: captions are of different
lengths, and not every batch holds every modality. What is hidden follows from the lengths alone, so an objective tells
its numbers from a batch without running the model; loaders look ahead over the batches of a step (`Batch.step`), and
ranks exchange one vector per step. A micro-batch then counts by what it holds: gradients are those of sums, and over
micro-batches and ranks they add up to the gradient of the joined batch.

A batch whose loader does not look ahead speaks for the other micro-batches of its step too; they count alike.
"""

from collections import Counter
from collections.abc import Callable, Iterable

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.step_records import BatchSize, NamedPlan, Term
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.losses import StepSize
from lightning_moevlm.model.objectives import Objective


class StepSizeMeter:
    """Knows the size of the step at hand; it is measured once per step.

    Args:
        objective: whose means are concerned.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._step = -1
        self._size: BatchSize | None = None
        self._saved: Tensor | None = None
        self._has_told = False

    def measure(
        self, batch: Batch, step: int, micro_batches: int, sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> BatchSize | None:
        """Return the size of the whole step; None where the objective does not know. All ranks must ask together.

        Args:
            batch: any of the step's.
            step: optimiser steps done.
            micro_batches: of the step, on each rank.
            sum_over_ranks: of a float64 vector on the device of the batch.
        """
        if self._size is not None and self._step == step:
            return self._size
        own = self._objective.size(batch)
        if own is None:
            return None
        numbers = own.to_vector()
        if self._saved is not None and self._step == step and self._saved.shape == numbers.shape:
            numbers = self._saved.to(numbers)
        else:
            if batch.step is None and micro_batches > 1:
                self._tell()
            others = (batch,) if batch.step is None else batch.step.batches
            known = [size.to_vector() for other in others if (size := self._objective.size(other)) is not None]
            numbers = sum_over_ranks(torch.stack(known).to(numbers).sum(dim=0) * micro_batches / len(known))
        size = own.from_vector(numbers)
        self._step, self._size = step, size if batch.step is not None else None
        return size

    def state(self, step: int) -> Tensor | None:
        """Return what a resume amid the step needs; None where every batch speaks for itself."""
        return self._size.to_vector().cpu() if self._size is not None and self._step == step else None

    def restore(self, step: int, state: Tensor | None) -> None:
        """Go on in the midst of a step."""
        self._step, self._size, self._saved = step, None, state

    def _tell(self) -> None:
        if not self._has_told:
            rank_zero_info(
                "Batches do not tell of their optimiser step, so micro-batches of unequal size count alike; the loader "
                "of ShardDataModule looks ahead, and lightning_moevlm.data.load.steps_ahead.StepsAhead makes others "
                "do so"
            )
        self._has_told = True


def step_size(
    size: BatchSize, num_parts: int, plans: Iterable[NamedPlan], backbone: Backbone, objective: Objective
) -> StepSize:
    """Return what the losses of a batch need to know of its step.

    Args:
        size: of the whole step.
        num_parts: micro-batches x ranks.
        plans: of the batch, which tell how many a pass makes; passes that it lacks are asked of the backbone.
        backbone: that runs them.
        objective: that asks for them.
    """
    own = Counter(named.source for named in plans)
    num_plans = [
        (one.sequences > 0) * (own[source] or backbone.num_plans(_modalities(source)))
        for source, one in size.passes.items()
    ]
    heads = [size.predictions[term] > 0 for term in objective.num_classes if term in size.predictions]
    none = torch.zeros((), dtype=torch.int64)
    return StepSize(num_parts, size, sum(num_plans, start=none).clamp(min=1), sum(heads, start=none))


def in_step(term: Term, num_predictions: Tensor, num_parts: int) -> Term:
    """Return a term of the task as a part of its step: its sum divided by all that the step predicts.

    Args:
        term: of a batch.
        num_predictions: of the whole step.
        num_parts: micro-batches x ranks.
    """
    assert term.num_predictions is not None, "an objective that knows its size counts its predictions"
    share = term.num_predictions * num_parts / num_predictions.clamp(min=1)
    return term._replace(in_step=term.raw * share)


def _modalities(source: str) -> tuple[Modality, ...]:
    kind = source.rpartition("/")[2]  # a joint objective puts the name of a part before it
    return tuple(Modality) if kind == "pair" else (Modality[kind.upper()],)
