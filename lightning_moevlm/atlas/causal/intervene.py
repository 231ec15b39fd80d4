"""Applies an intervention to one layer of a model while a block of code runs.

A hook on the layer's router replaces its plan, so every family and every adopted model runs as it does otherwise.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import nn

from lightning_moevlm.atlas.causal.interventions import Intervention
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import RoutingInput, RoutingPlan
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.backbones.trunk import Trunk
from lightning_moevlm.model.layers import Mixture, PatchCodes


@contextmanager
def intervene(backbone: Backbone, layer: str, intervention: Intervention) -> Iterator[None]:
    """Change every plan of a layer within the block.

    Args:
        backbone: in evaluation mode.
        layer: path of the layer in the backbone, as in a plan's `layer`.
        intervention: the change.

    Raises:
        UserError: a backbone in training mode, or no such layer.
    """
    if backbone.training:
        raise UserError("interventions change a model in evaluation: call backbone.eval() before")
    layers = sparse_layers(backbone)
    if layer not in layers:
        raise UserError(
            f"layer {layer!r} has no experts: choose one of {', '.join(layers) or 'none, the model is dense'}"
        )

    def change(router: nn.Module, arguments: tuple[RoutingInput, ...], plan: RoutingPlan) -> RoutingPlan:
        return intervention(plan, arguments[0])

    handle = layers[layer].router.register_forward_hook(change)
    try:
        with _identities(backbone) if intervention.reads_identity else nullcontext():
            yield
    finally:
        handle.remove()


def sparse_layers(backbone: Backbone) -> dict[str, Mixture]:
    """Return the layers with experts by path, in the order of the model."""
    return {layer.path: layer for layer in backbone.modules() if isinstance(layer, Mixture)}


@contextmanager
def _identities(backbone: Backbone) -> Iterator[None]:
    """Let a trunk whose routers do not read token ids and patch codes compute them."""
    if not isinstance(backbone, Trunk) or backbone.patch_codes is not None:
        yield
        return
    backbone.patch_codes = PatchCodes(backbone.spec.patch_size).to(backbone.text_embedding_VD.device)
    try:
        yield
    finally:
        backbone.patch_codes = None
