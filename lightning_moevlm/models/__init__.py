"""Models: arrangements of layers."""

from lightning_moevlm.models.backbone import Backbone, BackboneOutput, BackboneSpec
from lightning_moevlm.models.card import ModelCard, model_card
from lightning_moevlm.models.limoe import LIMoE
from lightning_moevlm.models.vl_moe import VLMoE

__all__ = ["Backbone", "BackboneOutput", "BackboneSpec", "LIMoE", "ModelCard", "VLMoE", "model_card"]
