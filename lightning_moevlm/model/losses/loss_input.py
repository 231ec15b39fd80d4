"""Inputs of routing losses: a plan, its layer, and its share in the optimiser step."""

from typing import NamedTuple

from torch import Tensor

from lightning_moevlm.contracts.routing_plan import Modality, RoutingPlan
from lightning_moevlm.contracts.step_records import BatchSize, PlanSize


class RoutedLayer(NamedTuple):
    """Properties of a layer that a loss may need, known before the first step.

    router: name of its class.
    adds_noise, mixes: see `Router`.
    has_rows: whether `LossInput.rows` will be there.
    rows_fit_experts: whether they are one per expert, of the width of a token.
    has_logits: see `Router`.
    """

    router: str
    num_experts: int
    adds_noise: bool
    mixes: bool
    has_rows: bool
    rows_fit_experts: bool = False
    has_logits: bool = True


class LayerCounts(NamedTuple):
    """Counts of a layer's router in the optimiser step so far, over forward passes, micro-batches and ranks.

    chosen_AE, kept_AE: int64, pairs of each modality at each expert before and after capacity.
    token_A: int64, tokens.
    aimed_share: experts per token that the router aims at, divided by E.
    tally: int64, what the router counts for its own balance, see `Router.tally`.
    """

    chosen_AE: Tensor
    kept_AE: Tensor
    token_A: Tensor
    aimed_share: float
    tally: Tensor


class Place(NamedTuple):
    """The place of a plan in the model: the fields of `NamedPlan`."""

    source: str = ""
    block: int = 0
    layer: str = ""
    modalities: tuple[Modality, ...] = tuple(Modality)


class StepSize(NamedTuple):
    """The optimiser step that a batch belongs to.

    num_parts: micro-batches x ranks.
    size: size of all of them together.
    num_plans: plans of their joined batch, a scalar.
    num_heads: terms with classes to predict, a scalar.
    """

    num_parts: int
    size: BatchSize
    num_plans: Tensor
    num_heads: Tensor

    def plan_size(self, place: Place) -> PlanSize:
        """Return the size of the joined batch's plan in a place."""
        return self.size.passes[place.source].select(place.modalities)


class LossInput(NamedTuple):
    """A plan in its place.

    rows: vectors that the router scores tokens against, one per expert or slot, with gradient; None if there are none.
    counts: counts of the plan's layer, this plan included; None in evaluation, and if no loss reads them.
    training: whether this is a training step; only then is there router noise.
    first_EDF: the first matrix of each of the layer's experts, with gradient; None if a loss is computed without them.
    """

    plan: RoutingPlan
    rows: Tensor | None = None
    counts: LayerCounts | None = None
    training: bool = True
    place: Place = Place()
    first_EDF: Tensor | None = None
