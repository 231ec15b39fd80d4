"""Actions on a model, once per optimiser step: QK-clip, revival of experts, frozen and older routers, rollback."""

from lightning_moevlm.training.actions.action import Action
from lightning_moevlm.training.actions.anticipate_routing import AnticipateRouting
from lightning_moevlm.training.actions.freeze_router import FreezeRouter
from lightning_moevlm.training.actions.options import Actions, build_actions
from lightning_moevlm.training.actions.qk_clip import QKClip
from lightning_moevlm.training.actions.revive_experts import ReviveDeadExperts
from lightning_moevlm.training.actions.rollback import Rollback
from lightning_moevlm.training.actions.runner import ActionRunner

__all__ = [
    "Action",
    "ActionRunner",
    "Actions",
    "AnticipateRouting",
    "FreezeRouter",
    "QKClip",
    "ReviveDeadExperts",
    "Rollback",
    "build_actions",
]
