"""Proof of an action: on copies it has its effect, and in the run its input reaches it.

    qk_clip              attention logits reach it; a copy's heads with logits of twice the threshold get smaller ones
    rebalance            counts reach it; a copy of a router whose tokens all go to one expert moves its state, and that
                         state, moved far enough, changes its choices
    revive_dead_experts  counts reach it; in a copy of a layer a long idle expert gets other weights
    freeze_router        a copy of a router keeps its gradients until the step and loses them after it; past that step
                         the run's router weights stand still
    anticipate_routing   layers take experts that were chosen elsewhere; the run has older routers, and while they
                         choose, some pairs are others than the current ones would take
    rollback             a copy goes back after a loss that is not finite; the run has a snapshot to go back to

Until its condition occurs an action is idle, and the receipt says how far off the condition is.
"""

import copy
from collections.abc import Callable
from typing import cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_moevlm.contracts.routing_plan import PairPlan, RoutingInput
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.layers import Attention, AttentionOutput, Mixture
from lightning_moevlm.model.losses import LayerCounts
from lightning_moevlm.model.routers import EarlierChoices, SigmoidBiasRouter
from lightning_moevlm.training.actions import Action
from lightning_moevlm.training.actions.action import StepFacts, Training
from lightning_moevlm.training.actions.anticipate_routing import RoutingAnticipator
from lightning_moevlm.training.actions.freeze_router import RouterFreezer
from lightning_moevlm.training.actions.qk_clip import QKClipper
from lightning_moevlm.training.actions.rebalance import find_self_balancing
from lightning_moevlm.training.actions.revive_experts import ExpertReviver
from lightning_moevlm.training.actions.rollback import SnapshotRing
from lightning_moevlm.training.callbacks.liveness.receipt import Receipt, Switch
from lightning_moevlm.training.callbacks.liveness.rehearsal import Rehearsal, replace_attribute

_FAR = 1e6  # times one move of a balancing state
_CROWD = 10.0  # on the logits of the expert that all tokens go to
_Proof = Callable[[Switch, Rehearsal, Trainer], Receipt]


class ActionProofs:
    """Asks the actions of a run; remembers the weights of frozen routers."""

    def __init__(self) -> None:
        self._frozen: list[Tensor] = []

    def receipts(self, rehearsal: Rehearsal, trainer: Trainer) -> list[Receipt]:
        """Return the receipt of every action; adaptive weights are proven with their losses."""
        proofs: dict[str, _Proof] = {
            "qk_clip": _qk_clip,
            "rebalance": _rebalance,
            "revive_dead_experts": _revive,
            "freeze_router": self._freeze,
            "anticipate_routing": _anticipate,
            "rollback": _rollback,
        }
        active_actions = rehearsal.module.active_actions
        return [_receipt(name, rehearsal, trainer, proof) for name, proof in proofs.items() if name in active_actions]

    def _freeze(self, switch: Switch, rehearsal: Rehearsal, trainer: Trainer) -> Receipt:
        options = rehearsal.module.actions.freeze_router
        assert options is not None
        last, step = options.after_steps, trainer.global_step
        layers = [layer for layer in rehearsal.module.backbone.modules() if isinstance(layer, Mixture)]
        weights = [p for layer in layers for p in layer.router.parameters()]
        if not weights:
            return switch.dead("no router has weights", "set model.actions.freeze_router to null")
        router = copy.deepcopy(layers[0].router)
        fake = _LayerCopy(layers[0], router)
        left = {}
        for number in (last, last + 1):
            for p in router.parameters():
                p.grad = torch.ones_like(p)
            RouterFreezer(options).before_step(fake.training(), number)
            left[number] = any(p.grad is not None for p in router.parameters())
        if left[last + 1] or not left[last]:
            return switch.dead("on a copy of a router it does not remove the gradients", "fix the action")
        if step <= last:
            ends = f", and the run ends at {trainer.max_steps}" if 0 < trainer.max_steps <= last else ""
            return switch.is_("idle", f"routers stand still after step {last}{ends}", 0.0)
        if not self._frozen:
            self._frozen = [p.detach().clone() for p in weights]
        moved = sum(not torch.equal(p.detach(), before) for p, before in zip(weights, self._frozen, strict=True))
        if moved:
            return switch.dead(
                f"{moved} of {len(weights)} router tensors moved after step {last}",
                "find the code that moves them without a gradient",
            )
        return switch.is_("alive", f"{len(weights)} router tensors stand still since step {last}", 0.0)


class _LayerCopy:
    """A copy of a MoE layer with its own router (and experts), on which actions can act."""

    def __init__(self, layer: Mixture, router: nn.Module, experts: nn.Module | None = None) -> None:
        twin = copy.copy(layer)
        twin._modules = {**layer._modules, "router": router}
        if experts is not None:
            twin._modules["experts"] = experts
        self.layer = twin
        self.root = nn.ModuleDict({"layer": twin})

    def training(self) -> Training:
        """Return the copy as if it were the whole model."""
        return Training(self.root, cast("Backbone", self.root), [], [], seed=0)


def _receipt(name: str, rehearsal: Rehearsal, trainer: Trainer, proof: _Proof) -> Receipt:
    """Check first that the action's input reaches it."""
    switch = Switch(f"actions.{name}", "action")
    action: Action = rehearsal.module.active_actions[name]
    runs = any(callback is rehearsal.module.action_runner for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if not runs:
        return switch.dead("nothing runs it: the module's ActionRunner is not among the callbacks", "add it")
    if "attention" in action.needs and not rehearsal.output.attention:
        return switch.dead(
            "it never gets its input: the objective returns no attention logits",
            f"choose a model with attention of ours, not of transformers, or set model.{switch.name} to null",
        )
    routed = [named for named in rehearsal.output.plans if isinstance(named.plan, PairPlan)]
    if "load" in action.needs and not routed:
        return switch.dead(
            "it never gets its input: no forward pass returns a plan that chooses experts",
            f"let the objective return `plans`, or set model.{switch.name} to null",
        )
    return proof(switch, rehearsal, trainer)


def _qk_clip(switch: Switch, rehearsal: Rehearsal, trainer: Trainer) -> Receipt:
    action, options = rehearsal.module.active_actions["qk_clip"], rehearsal.module.actions.qk_clip
    assert isinstance(action, QKClipper) and options is not None
    largest = max(float(seen.max_H.max()) for seen in rehearsal.output.attention)
    path = next((path for path, call in rehearsal.calls.items() if isinstance(call.output, AttentionOutput)), None)
    if path is None:
        return switch.is_("unproven", "no attention ran on this batch", 0.0)
    attention = copy.deepcopy(rehearsal.module.get_submodule(path))
    assert isinstance(attention, Attention)
    heads_H = torch.full((attention.num_heads,), 2 * options.threshold, device=rehearsal.module.device)
    before = rehearsal.layer(path, attention).logit_max_H
    root = nn.ModuleDict({"layer": attention})
    QKClipper(options).after_step(
        Training(root, cast("Backbone", root), [], [], 0), StepFacts(1, {}, {"layer": heads_H}, None)
    )
    after = rehearsal.layer(path, attention).logit_max_H
    # the largest logit of a head is halved, whatever its sign
    kept = float(after.abs().sum() / before.abs().sum().clamp(min=1e-30))
    if not kept < 0.9:
        return switch.dead(
            f"on a copy clipped to half, attention logits keep {kept:.2g} of their size",
            "let no norm undo the scale of queries and keys, or set model.actions.qk_clip to null",
        )
    evidence = f"largest attention logit {largest:.3g}, threshold {options.threshold:g}"
    return switch.is_("alive" if largest > options.threshold else "idle", evidence, largest)


def _rebalance(switch: Switch, rehearsal: Rehearsal, trainer: Trainer) -> Receipt:
    routers = find_self_balancing(rehearsal.module.backbone)
    if all(isinstance(router, SigmoidBiasRouter) and router.update_rate == 0 for router in routers):
        return switch.is_("off", "the routers' update_rate is 0", 0.0)
    found: list[float] = []
    for path, call in rehearsal.calls.items():
        layer = rehearsal.module.get_submodule(path)
        if not isinstance(layer, Mixture) or layer.router not in routers:
            continue
        router = copy.deepcopy(layer.router)
        before = {name: buffer.clone() for name, buffer in router.named_buffers()}
        plan = call.output.plans[0].plan
        assert isinstance(plan, PairPlan)
        load_AE = torch.zeros_like(rehearsal.counts[layer.path].chosen_AE)
        favourite = int(plan.chosen_loads()[0].argmax())
        load_AE[:, favourite] = plan.num_tokens
        crowded_TE = plan.logits_TE.detach().clone()
        crowded_TE[:, favourite] += _CROWD
        router.rebalance(load_AE, router.tally(plan._replace(logits_TE=crowded_TE)))
        moved = max(
            (float((buffer - before[name]).abs().max()) for name, buffer in router.named_buffers()), default=0.0
        )
        if not moved > 0:
            return switch.dead(
                f"{path}.router does not move its state when one expert has all tokens",
                "let `rebalance` move what the router chooses by, or choose another router",
            )
        with torch.no_grad():
            for name, buffer in router.named_buffers():
                buffer.copy_(before[name] + _FAR * (buffer - before[name]))
        turned = rehearsal.layer(f"{path}.router", router)
        if bool(turned.chosen_loads()[0][favourite] >= plan.chosen_loads()[0][favourite]):
            return switch.dead(
                f"{path}.router sends its busiest expert as many tokens as before, however far its state moves",
                "let the router's choice use its balancing state",
            )
        found.append(moved)
    if not found:
        return switch.is_("unproven", "no router that chooses ran on this batch")
    return switch.is_("alive", f"state moves by up to {max(found):.2g} a step and turns choices", max(found))


def _revive(switch: Switch, rehearsal: Rehearsal, trainer: Trainer) -> Receipt:
    options = rehearsal.module.actions.revive_dead_experts
    assert options is not None
    layers = {layer.path: layer for layer in rehearsal.module.backbone.modules() if isinstance(layer, Mixture)}
    smallest = min(layers.values(), key=lambda layer: sum(p.numel() for p in layer.parameters()))
    if trainer.global_step == 0 and smallest.num_experts > 1:
        holder = _LayerCopy(smallest, copy.deepcopy(smallest.router), copy.deepcopy(smallest.experts))
        chosen_AE = torch.ones_like(rehearsal.counts[smallest.path].chosen_AE[:, : smallest.num_experts])
        chosen_AE[:, -1] = 0
        before = holder.layer.experts.stacks()[0][-1].clone()
        reviver = ExpertReviver(options)
        idle_E = torch.full_like(chosen_AE[0], options.idle_steps)
        idle_E[:-1] = 0
        reviver.load_state_dict({"idle": {"layer": idle_E}})
        counts = LayerCounts(chosen_AE, chosen_AE, chosen_AE.sum(dim=1), 1.0, chosen_AE.new_zeros(0))
        reviver.after_step(holder.training(), StepFacts(options.every_n_steps, {"layer": counts}, {}, None))
        if torch.equal(before, holder.layer.experts.stacks()[0][-1]):
            return switch.dead("on a copy an expert without tokens stays what it was", "fix the action")
    empty = sum(
        int((rehearsal.counts[path].chosen_AE[:, : layer.num_experts].sum(dim=0) == 0).sum())
        for path, layer in layers.items()
    )
    experts = sum(layer.num_experts for layer in layers.values())
    what = f"{empty} of {experts} experts have no token here; {options.idle_steps} steps in a row make one dead"
    return switch.is_("idle", what, float(empty))


def _anticipate(switch: Switch, rehearsal: Rehearsal, trainer: Trainer) -> Receipt:
    action = rehearsal.module.active_actions["anticipate_routing"]
    assert isinstance(action, RoutingAnticipator)
    if action.chosen_by is None:
        return switch.dead("the run keeps no router", "fix the code that prepares steps")
    changed = total = 0
    for path, layer in rehearsal.module.backbone.named_modules():
        full_path = f"backbone.{path}"
        if not isinstance(layer, Mixture) or full_path not in rehearsal.calls:
            continue
        earlier, own = action.earlier(path), EarlierChoices(layer.router)

        def shifted(inputs: RoutingInput, own: EarlierChoices = own, count: int = layer.router.num_experts) -> Tensor:
            return (own(inputs) + 1) % count

        plans = []
        for choose in (own, shifted, earlier):
            with replace_attribute(layer, "choose", choose):
                plans.append(rehearsal.layer(full_path).plans[0].plan)
        by_itself, moved, by_earlier = plans
        if not torch.equal(moved.expert_N, (by_itself.expert_N + 1) % layer.router.num_experts):
            return switch.dead(
                f"{full_path} takes other experts than those that were chosen for it",
                "let its router take choices, or set model.actions.anticipate_routing to null",
            )
        changed += int(((by_earlier.expert_N != by_itself.expert_N) & by_itself.chosen_N).sum())
        total += int(by_itself.chosen_N.sum())
    if not total:
        return switch.is_("unproven", "no layer with a router ran on this batch")
    step, share = action.chosen_by, changed / total
    if not action.is_on:
        return switch.is_(
            "idle", f"no spike; routers of step {step} would choose {share:.2g} of pairs otherwise", share
        )
    evidence = f"routers of step {step} choose {share:.2g} of pairs otherwise than the current ones"
    return switch.is_("alive" if changed else "idle", evidence, share)


def _rollback(switch: Switch, rehearsal: Rehearsal, trainer: Trainer) -> Receipt:
    options, ring = rehearsal.module.actions.rollback, rehearsal.module.active_actions["rollback"]
    assert options is not None and isinstance(ring, SnapshotRing)
    linear = nn.Linear(1, 1)
    training = Training(linear, cast("Backbone", linear), [], [], 0)
    copied = SnapshotRing(options)
    copied.start(training, 0)
    before = linear.weight.detach().clone()
    with torch.no_grad():
        linear.weight += 1.0
    copied.rewind(training, StepFacts(1, {}, {}, torch.tensor(torch.nan)))
    if not torch.equal(linear.weight, before):
        return switch.dead("a copy does not go back after a loss that is not finite", "fix the action")
    if ring.can_roll_back and not ring.snapshots:
        return switch.dead("the run has no snapshot to go back to", "fix the code that takes snapshots")
    if not ring.can_roll_back:
        return switch.is_("alive", f"all {options.max_rollbacks} rollbacks are used up", 0.0)
    steps = ", ".join(str(step) for step in ring.snapshots)
    return switch.is_("idle", f"snapshots of step {steps} to go back to", float(len(ring.snapshots)))
