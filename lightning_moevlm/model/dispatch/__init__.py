"""Dispatchers run a plan: (plan, tokens, experts) -> tokens. The slow loop is the reference for the others."""

from lightning_moevlm.model.dispatch.all_experts import run_everywhere
from lightning_moevlm.model.dispatch.auto.auto import AutoDispatcher
from lightning_moevlm.model.dispatch.capacity import Capacity, ModalityFactors, apply_capacity
from lightning_moevlm.model.dispatch.capacity_rule import ByDropRate
from lightning_moevlm.model.dispatch.dispatcher import Dispatcher, DispatchRecord
from lightning_moevlm.model.dispatch.expert_protocol import Experts, Linear
from lightning_moevlm.model.dispatch.grouped_mm import GroupedDispatcher
from lightning_moevlm.model.dispatch.loop import LoopDispatcher
from lightning_moevlm.model.dispatch.padded import PaddedDispatcher
from lightning_moevlm.model.dispatch.segments.segments import SegmentDispatcher

__all__ = [
    "AutoDispatcher",
    "ByDropRate",
    "Capacity",
    "DispatchRecord",
    "Dispatcher",
    "Experts",
    "GroupedDispatcher",
    "Linear",
    "LoopDispatcher",
    "ModalityFactors",
    "PaddedDispatcher",
    "SegmentDispatcher",
    "apply_capacity",
    "run_everywhere",
]
