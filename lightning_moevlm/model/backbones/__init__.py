"""Models: arrangements of layers."""

from lightning_moevlm.contracts.model_card import ModelCard
from lightning_moevlm.model.backbones.adopted.hugging_face import HuggingFaceModel
from lightning_moevlm.model.backbones.adopted.trained_parts import LoRA
from lightning_moevlm.model.backbones.backbone import Backbone, BackboneOutput, BackboneSpec
from lightning_moevlm.model.backbones.limoe import LIMoE
from lightning_moevlm.model.backbones.model_costs import model_card, pair_costs
from lightning_moevlm.model.backbones.moe_decoder import MoEDecoder
from lightning_moevlm.model.backbones.moma import MoMa
from lightning_moevlm.model.backbones.vision_tower import ConnectorOptions, VisionOptions
from lightning_moevlm.model.backbones.vl_moe import VLMoE

__all__ = [
    "Backbone",
    "BackboneOutput",
    "BackboneSpec",
    "ConnectorOptions",
    "HuggingFaceModel",
    "LIMoE",
    "LoRA",
    "MoEDecoder",
    "MoMa",
    "ModelCard",
    "VLMoE",
    "VisionOptions",
    "model_card",
    "pair_costs",
]
