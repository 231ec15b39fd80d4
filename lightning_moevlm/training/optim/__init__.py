"""Optimisers, parameter groups, schedules and gradient stabilisers, beside torch's own."""

from lightning_moevlm.training.optim.gradients.ada_gc import AdaGC
from lightning_moevlm.training.optim.gradients.gradient_control import GradientControl, GradientEvents
from lightning_moevlm.training.optim.gradients.gradient_norms import GradientNorms
from lightning_moevlm.training.optim.gradients.gradient_stabilisers import GradientStabilisers
from lightning_moevlm.training.optim.gradients.skip_spikes import SkipSpikes
from lightning_moevlm.training.optim.gradients.z_clip import ZClip
from lightning_moevlm.training.optim.optimizers.hyperball import Hyperball
from lightning_moevlm.training.optim.optimizers.lion import Lion
from lightning_moevlm.training.optim.optimizers.muon import MuonAdamW
from lightning_moevlm.training.optim.optimizers.rounded_state import round_state
from lightning_moevlm.training.optim.optimizers.stable_adamw import StableAdamW
from lightning_moevlm.training.optim.parameter_groups import (
    GroupOptions,
    ParameterGroup,
    build_optimizer,
    parameter_groups,
    parameter_names,
)
from lightning_moevlm.training.optim.schedules.rate_jump import RateJump
from lightning_moevlm.training.optim.schedules.warmup import WarmupSchedule
from lightning_moevlm.training.optim.schedules.warmup_cosine import WarmupCosine
from lightning_moevlm.training.optim.schedules.warmup_linear import WarmupLinear
from lightning_moevlm.training.optim.schedules.warmup_stable_decay import WarmupStableDecay

__all__ = [
    "AdaGC",
    "GradientControl",
    "GradientEvents",
    "GradientNorms",
    "GradientStabilisers",
    "GroupOptions",
    "Hyperball",
    "Lion",
    "MuonAdamW",
    "ParameterGroup",
    "RateJump",
    "SkipSpikes",
    "StableAdamW",
    "WarmupCosine",
    "WarmupLinear",
    "WarmupSchedule",
    "WarmupStableDecay",
    "ZClip",
    "build_optimizer",
    "parameter_groups",
    "parameter_names",
    "round_state",
]
