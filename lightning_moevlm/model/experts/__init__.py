"""Stacked expert feed-forwards."""

from lightning_moevlm.model.dispatch.expert_protocol import Activation, Linear
from lightning_moevlm.model.experts.expert_stack import ExpertStack, ExpertWeights
from lightning_moevlm.model.experts.free import FreeExperts, leave_out_free
from lightning_moevlm.model.experts.gated import GatedExperts
from lightning_moevlm.model.experts.gated_unit import GLU, ClampedGLU, SiTUGLU, gated_unit, kept_by_unit
from lightning_moevlm.model.experts.mlp import MLPExperts
from lightning_moevlm.model.initial_weights import ExpertInit

__all__ = [
    "GLU",
    "Activation",
    "ClampedGLU",
    "ExpertInit",
    "ExpertStack",
    "ExpertWeights",
    "FreeExperts",
    "GatedExperts",
    "Linear",
    "MLPExperts",
    "SiTUGLU",
    "gated_unit",
    "kept_by_unit",
    "leave_out_free",
]
