"""Run a plan: (plan, tokens, experts) -> tokens. The slow loop is the oracle, the others must equal it."""

from lightning_moevlm.dispatch.auto import AutoDispatcher
from lightning_moevlm.dispatch.capacity import Capacity, ModalityFactors, apply_capacity
from lightning_moevlm.dispatch.capacity_rule import ByDropRate
from lightning_moevlm.dispatch.dispatcher import Dispatcher
from lightning_moevlm.dispatch.everywhere import run_everywhere
from lightning_moevlm.dispatch.expert_protocol import Experts, Linear
from lightning_moevlm.dispatch.grouped import GroupedDispatcher
from lightning_moevlm.dispatch.loop import LoopDispatcher
from lightning_moevlm.dispatch.padded import PaddedDispatcher
from lightning_moevlm.dispatch.segments import SegmentDispatcher

__all__ = [
    "AutoDispatcher",
    "ByDropRate",
    "Capacity",
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
