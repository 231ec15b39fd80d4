"""Measures an optimiser step before it is computed: its predictions and routed tokens over micro-batches and ranks.

A mean over the step is a sum divided by a number that no single micro-batch knows: captions differ in length, and not
every batch holds every modality. The number of masked positions follows from the lengths, so an objective counts them
without running the model. Loaders look ahead over the batches of a step (`Batch.step`), and ranks exchange one vector
per step. Gradients are then those of sums: over micro-batches and ranks they add up to that of the joined batch.

If a loader does not look ahead, a batch stands for the other micro-batches of its step, and all count alike.
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
    """Measures the current step once.

    Args:
        objective: counts the predictions of a batch.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._step = -1
        self._size: BatchSize | None = None
        self._saved: Tensor | None = None
        self._has_reported = False

    def measure(
        self, batch: Batch, step: int, micro_batches: int, sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> BatchSize | None:
        """Return the size of the whole step; None if the objective cannot tell. All ranks must call it together.

        Args:
            batch: any of the step's.
            step: optimiser steps done.
            micro_batches: number per step on each rank.
            sum_over_ranks: sums a float64 vector on the device of the batch.
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
                self._report()
            others = (batch,) if batch.step is None else batch.step.batches
            known = [size.to_vector() for other in others if (size := self._objective.size(other)) is not None]
            numbers = sum_over_ranks(
                torch.stack(known).to(numbers, non_blocking=True).sum(dim=0) * micro_batches / len(known)
            )
        size = own.from_vector(numbers)
        self._step, self._size = step, size if batch.step is not None else None
        return size

    def state(self, step: int) -> Tensor | None:
        """Return the state for a resume within the step; None if the loader does not look ahead."""
        return self._size.to_vector().cpu() if self._size is not None and self._step == step else None

    def restore(self, step: int, state: Tensor | None) -> None:
        """Continue within a step."""
        self._step, self._size, self._saved = step, None, state

    def _report(self) -> None:
        if not self._has_reported:
            rank_zero_info(
                "This loader does not look ahead over the optimiser step, so micro-batches of unequal size count "
                "alike. Wrap it in lightning_moevlm.data.load.steps_ahead.StepsAhead, as ShardDataModule does"
            )
        self._has_reported = True


def step_size(
    size: BatchSize, num_parts: int, plans: Iterable[NamedPlan], backbone: Backbone, objective: Objective
) -> StepSize:
    """Return the numbers of the whole step that the losses of a batch divide by.

    Args:
        size: of the whole step.
        num_parts: micro-batches x ranks.
        plans: of the batch; they show the number per pass. The backbone knows it for passes that the batch lacks.
        backbone: runs the passes.
        objective: requests them.
    """
    own = Counter(named.source for named in plans)
    num_plans = [
        (one.sequences > 0) * (own[source] or backbone.num_plans(_modalities(source)))
        for source, one in size.passes.items()
    ]
    heads = [size.predictions[term] > 0 for term in objective.num_classes if term in size.predictions]
    none = torch.zeros((), dtype=torch.int64)
    return StepSize(num_parts, size, sum(num_plans, start=none).clamp(min=1), sum(heads, start=none))


def scale_to_step(term: Term, num_predictions: Tensor, num_parts: int) -> Term:
    """Return a task term as a part of its step: its sum divided by the predictions of the step.

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
