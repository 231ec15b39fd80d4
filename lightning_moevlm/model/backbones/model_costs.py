"""Counts what a model costs: all parameters, active parameters, active FLOPs."""

from lightning_moevlm.contracts.model_card import ModelCard
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.model.backbones.backbone import Backbone
from lightning_moevlm.model.layers import MoEFFN


def model_card(backbone: Backbone) -> ModelCard:
    """Count a backbone; heads of objectives are not part of it."""
    total = sum(parameter.numel() for parameter in backbone.parameters())
    idle = 0.0
    for module in backbone.modules():
        if isinstance(module, MoEFFN):
            experts = sum(parameter.numel() for parameter in module.experts.parameters())
            idle += experts * (1 - min(1.0, module.router.experts_per_token / module.num_experts))
    spec = backbone.spec
    flops = backbone.forward_flops({Modality.IMAGE: spec.num_patches, Modality.TEXT: spec.max_text_len})
    return ModelCard(total, round(total - idle), round(flops))
