"""Stacked expert feed-forwards."""

from lightning_moevlm.experts.expert_stack import ExpertStack, Linear
from lightning_moevlm.experts.gated import GatedExperts
from lightning_moevlm.experts.mlp import MLPExperts

__all__ = ["ExpertStack", "GatedExperts", "Linear", "MLPExperts"]
