"""Auxiliary losses: pure functions of plans, and the set of switches that turns them on."""

from lightning_moevlm.losses.auxiliary import AuxiliaryLosses
from lightning_moevlm.losses.importance import Importance, importance
from lightning_moevlm.losses.load_balance import LoadBalance, load_balance
from lightning_moevlm.losses.modality_entropy import GlobalEntropy, LocalEntropy
from lightning_moevlm.losses.router_z import RouterZ, router_z

__all__ = [
    "AuxiliaryLosses",
    "GlobalEntropy",
    "Importance",
    "LoadBalance",
    "LocalEntropy",
    "RouterZ",
    "importance",
    "load_balance",
    "router_z",
]
