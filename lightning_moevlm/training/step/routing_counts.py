"""Counts the routers' choices in the current optimiser step, once for all readers.

Loss-free balancing, balance losses of global scope and weights that follow drop rate or sparsity read these counts.
They come from the plans that a training step returns, not from `forward`, which activation checkpointing runs twice.
They are summed over forward passes and micro-batches, and over ranks in one exchange for all layers. The next
optimiser step resets them, so a checkpoint needs them only within an accumulation.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.contracts.routing_plan import MixPlan, Modality
from lightning_moevlm.contracts.step_records import NamedPlan
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.layers import Mixture
from lightning_moevlm.model.losses import LayerCounts, LossInput, Place
from lightning_moevlm.model.routers import Router


class _Layer(NamedTuple):
    router: Router

    @property
    def sizes(self) -> list[int]:
        """Sizes of the four counts, in order."""
        pairs = len(Modality) * self.router.num_experts
        return [pairs, pairs, len(Modality), self.router.tally_size]


class RoutingCounter:
    """Counts of every MoE layer in the current optimiser step.

    Every layer has its place from the start, so ranks exchange the same numbers even if one of them had no text.
    Routers of soft slots choose nothing and are not counted.

    Args:
        backbone: holds the layers.
    """

    def __init__(self, backbone: Backbone) -> None:
        layers = {path: module for path, module in backbone.named_modules() if isinstance(module, Mixture)}
        self._layers = {path: _Layer(module.router) for path, module in layers.items()}
        self._step = 0
        self._counts: dict[str, Tensor] = {}
        self._totals: dict[str, LayerCounts] | None = None

    @torch.no_grad()
    def add(self, step: int, plans: Iterable[NamedPlan]) -> None:
        """Count the plans of one micro-batch; step: optimiser steps done, a new one resets the counts."""
        if step != self._step:
            self._step, self._counts = step, {}
        for named in plans:
            plan = named.plan
            if isinstance(plan, MixPlan):
                continue
            chosen_AE = plan.chosen_loads(plan.modality_T, len(Modality))
            kept_AE = plan.kept_loads(plan.modality_T, len(Modality))
            token_A = torch.stack([(plan.valid_T & (plan.modality_T == modality)).sum() for modality in Modality])
            tally = self._layers[named.layer].router.tally(plan)
            counts = torch.cat([chosen_AE.flatten(), kept_AE.flatten(), token_A, tally])
            before = self._counts.get(named.layer)
            self._counts[named.layer] = counts if before is None else before + counts
        self._totals = None

    def totals(self, sum_over_ranks: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, LayerCounts]:
        """Return the counts of every layer over all ranks; a second call exchanges nothing."""
        if self._totals is None:
            pieces = self.state(sum_over_ranks, device)
            self._totals = {path: _layer_counts(pieces[path], layer) for path, layer in self._layers.items()}
        return self._totals

    def state(self, sum_over_ranks: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, Tensor]:
        """Return the counts over all ranks, as `restore` takes them; all ranks must call it together."""
        zeros = {
            path: torch.zeros(sum(layer.sizes), dtype=torch.int64, device=device)
            for path, layer in self._layers.items()
        }
        flat = (
            torch.cat(list((zeros | self._counts).values()))
            if zeros
            else torch.zeros(0, dtype=torch.int64, device=device)
        )
        pieces = sum_over_ranks(flat).split([sum(layer.sizes) for layer in self._layers.values()])
        return dict(zip(self._layers, pieces, strict=True))

    def restore(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Continue from a state, on one of the ranks; step: optimiser steps done."""
        self._step, self._counts, self._totals = step, dict(state), None


def _layer_counts(piece: Tensor, layer: _Layer) -> LayerCounts:
    chosen, kept, token_A, tally = piece.split(layer.sizes)
    shape = (len(Modality), layer.router.num_experts)
    aimed_share = layer.router.experts_per_token / layer.router.num_experts
    return LayerCounts(chosen.view(shape), kept.view(shape), token_A, aimed_share, tally)


def loss_inputs(
    backbone: Backbone, plans: Iterable[NamedPlan], counts: Mapping[str, LayerCounts], training: bool
) -> list[LossInput]:
    """Return one input per plan, with the weights that losses read; counts: of each layer, of the step so far."""
    inputs = []
    for named in plans:
        layer = backbone.get_submodule(named.layer)
        assert isinstance(layer, Mixture)
        layer_counts = None if isinstance(named.plan, MixPlan) else counts.get(named.layer)
        place = Place(named.source, named.block, named.layer, named.modalities)
        rows, first_EDF = layer.router.rows(), layer.experts.stacks()[0]
        inputs.append(LossInput(named.plan, rows, layer_counts, training, place, first_EDF))
    return inputs
