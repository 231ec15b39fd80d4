"""Stacked expert feed-forwards."""

from lightning_moevlm.experts.expert_stack import Activation, ExpertInit, ExpertStack, Linear
from lightning_moevlm.experts.gated import GatedExperts
from lightning_moevlm.experts.mlp import MLPExperts

__all__ = ["Activation", "ExpertInit", "ExpertStack", "GatedExperts", "Linear", "MLPExperts"]
