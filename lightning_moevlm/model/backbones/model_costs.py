"""Counts what a model costs: all parameters, active parameters, active FLOPs."""

from lightning_moevlm.contracts.model_card import Costs, ModelCard
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.model.backbones.backbone import Backbone
from lightning_moevlm.model.layers import Mixture, count_parameters


def model_card(backbone: Backbone) -> ModelCard:
    """Count a backbone; heads of objectives are not part of it."""
    total = count_parameters(backbone)
    idle = sum(module.idle_parameters() for module in backbone.modules() if isinstance(module, Mixture))
    return ModelCard(total, round(total - idle), round(pair_costs(backbone).flops))


def pair_costs(backbone: Backbone) -> Costs:
    """Return the costs of one forward pass over one image-text pair of full length."""
    spec = backbone.spec
    return backbone.costs({Modality.IMAGE: spec.num_patches, Modality.TEXT: spec.max_text_len})
