"""The set of auxiliary losses: one nullable field per loss, so that an arm turns one off without touching the others.

Each loss is the mean over the plans of a step (MoE layers x forward passes), so its scale does not move with depth.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch

from lightning_moevlm.losses.importance import Importance
from lightning_moevlm.losses.load_balance import LoadBalance
from lightning_moevlm.losses.modality_entropy import GlobalEntropy, LocalEntropy
from lightning_moevlm.losses.router_z import RouterZ
from lightning_moevlm.plans import RoutingPlan
from lightning_moevlm.records import Term


@dataclass(frozen=True)
class AuxiliaryLosses:
    """Auxiliary losses on routing; null turns one off.

    Args:
        load_balance: Switch load-balancing loss.
        router_z: ST-MoE router z-loss.
        importance: equal total gate weight.
        local_entropy: LIMoE, every token sure of its expert, per modality.
        global_entropy: LIMoE, every modality spread over experts.
    """

    load_balance: LoadBalance | None = field(default_factory=LoadBalance)
    router_z: RouterZ | None = field(default_factory=RouterZ)
    importance: Importance | None = None
    local_entropy: LocalEntropy | None = None
    global_entropy: GlobalEntropy | None = None

    def terms(self, plans: Sequence[RoutingPlan]) -> dict[str, Term]:
        """Return each enabled loss, averaged over plans; empty where nothing was routed (a dense model)."""
        if not plans:
            return {}
        enabled = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {
            name: Term(torch.stack([loss(plan) for plan in plans]).mean(), loss.weight)
            for name, loss in enabled.items()
            if loss is not None
        }
