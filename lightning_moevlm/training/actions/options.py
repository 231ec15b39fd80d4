"""The set of actions: one nullable field each, so an arm turns one on without touching the others."""

from dataclasses import dataclass

from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.training.actions.action import Action
from lightning_moevlm.training.actions.anticipate_routing import AnticipateRouting, RoutingAnticipator
from lightning_moevlm.training.actions.capacity_factors import CapacityFactors, find_changing_layers
from lightning_moevlm.training.actions.freeze_router import FreezeRouter, RouterFreezer
from lightning_moevlm.training.actions.qk_clip import QKClip, QKClipper
from lightning_moevlm.training.actions.rebalance import Rebalancer, find_self_balancing
from lightning_moevlm.training.actions.revive_experts import ExpertReviver, ReviveDeadExperts
from lightning_moevlm.training.actions.rollback import Rollback, SnapshotRing


@dataclass(frozen=True)
class Actions:
    """Actions on the model once per optimiser step, after the update; null is off.

    Args:
        qk_clip: shrinks query and key weights of heads with too large attention logits.
        revive_dead_experts: restarts experts without tokens as noisy copies of busy ones.
        freeze_router: freezes routers after some steps.
        rollback: restores an earlier state after a loss spike.
        anticipate_routing: lets older routers choose experts for a while after a loss spike.
    """

    qk_clip: QKClip | None = None
    revive_dead_experts: ReviveDeadExperts | None = None
    freeze_router: FreezeRouter | None = None
    rollback: Rollback | None = None
    anticipate_routing: AnticipateRouting | None = None


def build_actions(options: Actions, backbone: Backbone) -> dict[str, Action]:
    """Return the actions in their order, by name; self-balancing routers come first.

    Raises:
        UserError: an action that cannot act on this model.
    """
    last_step = None if options.freeze_router is None else options.freeze_router.after_steps
    actions: dict[str, Action] = {}
    if find_self_balancing(backbone):
        actions["rebalance"] = Rebalancer(last_step)
    changing = find_changing_layers(backbone)
    if changing:
        actions["capacity_factors"] = CapacityFactors(changing)
    if options.freeze_router is not None:
        actions["freeze_router"] = RouterFreezer(options.freeze_router)
    if options.qk_clip is not None:
        options.qk_clip.check(backbone)
        actions["qk_clip"] = QKClipper(options.qk_clip)
    if options.revive_dead_experts is not None:
        options.revive_dead_experts.check(backbone)
        actions["revive_dead_experts"] = ExpertReviver(options.revive_dead_experts, last_step)
    if options.anticipate_routing is not None:
        options.anticipate_routing.check(backbone)
        actions["anticipate_routing"] = RoutingAnticipator(options.anticipate_routing, backbone)
    if options.rollback is not None:
        actions["rollback"] = SnapshotRing(options.rollback)
    return actions
