"""What a model costs: parameters in memory, parameters and FLOPs that work."""

from typing import NamedTuple

from lightning_moevlm.layers import MoEFFN
from lightning_moevlm.models.backbone import Backbone
from lightning_moevlm.plans import Modality


class ModelCard(NamedTuple):
    """Costs of a backbone.

    total_parameters: all. active_parameters: without the experts that a token does not visit.
    active_flops_per_sample: matrix FLOPs of one forward pass over one image-text pair of full length; a multiply and an
    add count as two. Held against torch's FlopCounterMode within 1 % by a test.
    """

    total_parameters: int
    active_parameters: int
    active_flops_per_sample: int


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
