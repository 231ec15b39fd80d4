"""Refuses auxiliary losses that are not defined for a router of the model."""

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.layers import Mixture
from lightning_moevlm.model.losses import AuxiliaryLosses, RoutedLayer
from lightning_moevlm.model.objectives import Objective


def refuse_unsuited_losses(losses: AuxiliaryLosses, backbone: Backbone, objective: Objective) -> None:
    """Refuse losses that do not fit the model or the objective."""
    objective.check_backbone(backbone)
    if losses.output_z is not None and not objective.num_classes:
        raise UserError(
            "losses.output_z needs class logits, which this objective does not predict: set losses.output_z to null, "
            "or choose image targets that are codes"
        )
    layers = [module for module in backbone.modules() if isinstance(module, Mixture)]
    losses.check(_describe(layer) for layer in layers)


def _describe(layer: Mixture) -> RoutedLayer:
    rows = layer.router.rows()
    return RoutedLayer(
        router=type(layer.router).__name__,
        num_experts=layer.router.num_experts,
        adds_noise=layer.router.adds_noise,
        mixes=layer.router.mixes,
        has_rows=rows is not None,
        rows_fit_experts=rows is not None and rows.shape == layer.experts.stacks()[0].shape[:2],
        has_logits=layer.router.has_logits,
    )
