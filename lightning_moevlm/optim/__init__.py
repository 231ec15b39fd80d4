"""Optimisers, parameter groups, schedules, gradient stabilisers: torch's own wherever there is one."""

from lightning_moevlm.optim.ada_gc import AdaGC
from lightning_moevlm.optim.gradient_control import GradientControl, GradientEvents
from lightning_moevlm.optim.gradient_stabilisers import GradientStabilisers
from lightning_moevlm.optim.lion import Lion
from lightning_moevlm.optim.muon import MuonAdamW
from lightning_moevlm.optim.parameter_groups import GroupOptions, ParameterGroup, parameter_groups
from lightning_moevlm.optim.rounded_state import round_state
from lightning_moevlm.optim.skip_spikes import SkipSpikes
from lightning_moevlm.optim.stable_adamw import StableAdamW
from lightning_moevlm.optim.warmup import WarmupSchedule
from lightning_moevlm.optim.warmup_cosine import WarmupCosine
from lightning_moevlm.optim.warmup_linear import WarmupLinear
from lightning_moevlm.optim.warmup_stable_decay import WarmupStableDecay
from lightning_moevlm.optim.z_clip import ZClip

__all__ = [
    "AdaGC",
    "GradientControl",
    "GradientEvents",
    "GradientStabilisers",
    "GroupOptions",
    "Lion",
    "MuonAdamW",
    "ParameterGroup",
    "SkipSpikes",
    "StableAdamW",
    "WarmupCosine",
    "WarmupLinear",
    "WarmupSchedule",
    "WarmupStableDecay",
    "ZClip",
    "parameter_groups",
    "round_state",
]
