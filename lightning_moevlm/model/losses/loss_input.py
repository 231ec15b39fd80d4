"""What a loss on routing may look at: a plan, and what its layer knows beyond it; and what it may ask of a layer."""

from typing import NamedTuple

from torch import Tensor

from lightning_moevlm.contracts.routing_plan import Modality, RoutingPlan
from lightning_moevlm.contracts.step_records import BatchSize, PlanSize


class RoutedLayer(NamedTuple):
    """What a loss may need of a layer, known before the first step.

    router: name of its class. adds_noise, mixes: see `Router`. has_rows: whether `LossInput.rows` will be there.
    """

    router: str
    num_experts: int
    adds_noise: bool
    mixes: bool
    has_rows: bool


class LayerCounts(NamedTuple):
    """What a layer's router has done in the optimiser step so far, in all its forward passes, micro-batches and ranks.

    chosen_AE, kept_AE: int64, pairs of each modality at each expert before and after capacity. token_A: int64, tokens.
    aimed_share: experts per token that the router aims at, divided by E.
    """

    chosen_AE: Tensor
    kept_AE: Tensor
    token_A: Tensor
    aimed_share: float


class Place(NamedTuple):
    """Where a plan comes from: the fields of `NamedPlan`."""

    source: str = ""
    block: int = 0
    layer: str = ""
    modalities: tuple[Modality, ...] = tuple(Modality)


class StepSize(NamedTuple):
    """The optimiser step that a batch is a part of.

    num_parts: micro-batches x ranks. size: of all of them together. num_plans: that their joined batch would make.
    num_heads: terms that predict classes and have something to predict. The two are scalars.
    """

    num_parts: int
    size: BatchSize
    num_plans: Tensor
    num_heads: Tensor

    def plan_size(self, place: Place) -> PlanSize:
        """Return the size of the plan that the joined batch would have in a place."""
        return self.size.passes[place.source].select(place.modalities)


class LossInput(NamedTuple):
    """A plan in its place.

    rows: the vectors that the router scores tokens against, one per expert or slot, with gradient; None: has none.
    counts: of the plan's layer, this plan's included; None in evaluation, and where no loss asks for them.
    training: whether this is a training step: router noise, and what needs it, exists in no other.
    """

    plan: RoutingPlan
    rows: Tensor | None = None
    counts: LayerCounts | None = None
    training: bool = True
    place: Place = Place()
