"""Run a plan: (plan, tokens, experts) -> tokens. The slow loop is the oracle, the others must equal it."""

from lightning_moevlm.dispatch.capacity import Capacity, apply_capacity
from lightning_moevlm.dispatch.dispatcher import Dispatcher
from lightning_moevlm.dispatch.expert_protocol import Experts, Linear
from lightning_moevlm.dispatch.grouped import GroupedDispatcher
from lightning_moevlm.dispatch.loop import LoopDispatcher
from lightning_moevlm.dispatch.padded import PaddedDispatcher
from lightning_moevlm.dispatch.segments import SegmentDispatcher

__all__ = [
    "Capacity",
    "Dispatcher",
    "Experts",
    "GroupedDispatcher",
    "Linear",
    "LoopDispatcher",
    "PaddedDispatcher",
    "SegmentDispatcher",
    "apply_capacity",
]
