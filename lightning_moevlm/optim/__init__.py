"""Optimisers, schedules, clipping: torch's own wherever there is one."""

from lightning_moevlm.optim.parameter_groups import ParameterGroup, parameter_groups
from lightning_moevlm.optim.rounded_state import round_state
from lightning_moevlm.optim.warmup_cosine import WarmupCosine

__all__ = ["ParameterGroup", "WarmupCosine", "parameter_groups", "round_state"]
