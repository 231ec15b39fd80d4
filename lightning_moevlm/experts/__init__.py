"""Stacked expert feed-forwards."""

from lightning_moevlm.experts.expert_stack import Activation, ExpertStack, Linear
from lightning_moevlm.experts.gated import GatedExperts
from lightning_moevlm.experts.mlp import MLPExperts
from lightning_moevlm.initial_weights import ExpertInit

__all__ = ["Activation", "ExpertInit", "ExpertStack", "GatedExperts", "Linear", "MLPExperts"]
