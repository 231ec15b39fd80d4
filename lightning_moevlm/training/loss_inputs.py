"""From the plans of a step to what the losses on routing look at."""

from collections.abc import Iterable, Mapping

from lightning_moevlm.layers import MoEFFN
from lightning_moevlm.losses import LayerCounts, LossInput, Place
from lightning_moevlm.models import Backbone
from lightning_moevlm.plans import MixPlan
from lightning_moevlm.records import NamedPlan


def loss_inputs(
    backbone: Backbone, plans: Iterable[NamedPlan], counts: Mapping[str, LayerCounts], training: bool
) -> list[LossInput]:
    """Return one input per plan, with the rows of its router; counts: by MoE layer, of the optimiser step so far."""
    inputs = []
    for named in plans:
        layer = backbone.get_submodule(named.layer)
        assert isinstance(layer, MoEFFN)
        layer_counts = None if isinstance(named.plan, MixPlan) else counts.get(named.layer)
        place = Place(named.source, named.block, named.layer, named.modalities)
        inputs.append(LossInput(named.plan, layer.router.rows(), layer_counts, training, place))
    return inputs
