"""Proof of a routing switch: without it, its layers route the same tokens differently.

    gate.jitter, gate.dropout   the router's logits with the noise, and without any
    gate.temperature            the router's logits with it, and with a temperature of 1
    router.choices              tokens use different numbers of experts, where the router says that they may
    moe.free                    a share of the choices go to free experts
    moe.capacity                it drops pairs here; if not, a capacity of one place per expert does, so the layer is
                                known to respect its capacity

Each router or layer with the switch runs again on its inputs of the rehearsal, and each must show a difference. A
plan's logits precede the router's own noise and bias, so these cannot stand in for the gate's.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from lightning_moevlm.contracts.routing_plan import PairPlan
from lightning_moevlm.model.layers import Mixture
from lightning_moevlm.model.routers import Gate, Router
from lightning_moevlm.training.callbacks.liveness.receipt import Receipt, Switch
from lightning_moevlm.training.callbacks.liveness.rehearsal import Rehearsal, replace_attribute

_NEXT_TO_NONE = 1e-12
"""A capacity factor that leaves each expert one place at most."""


def routing_receipts(rehearsal: Rehearsal) -> list[Receipt]:
    """Return the receipts of gates and capacities."""
    ran = {path: rehearsal.module.get_submodule(path) for path in rehearsal.calls}
    gates = {path: layer.gate for path, layer in ran.items() if isinstance(layer, Router)}
    quiet = {path: replace(gate, jitter=0.0, dropout=0.0) for path, gate in gates.items()}
    asked: tuple[tuple[str, float, Callable[[Gate, Gate], Gate]], ...] = (
        ("jitter", 0.0, lambda gate, calm: replace(calm, jitter=gate.jitter)),
        ("dropout", 0.0, lambda gate, calm: replace(calm, dropout=gate.dropout)),
        ("temperature", 1.0, lambda gate, calm: calm),
    )
    receipts = []
    for name, neutral, with_it in asked:
        pairs = {
            path: (with_it(gate, quiet[path]), replace(quiet[path], **{name: neutral}))
            for path, gate in gates.items()
            if getattr(gate, name) != neutral
        }
        if pairs:
            receipts.append(_gate(rehearsal, name, pairs))
    varying = [path for path, layer in ran.items() if isinstance(layer, Router) and layer.choices_vary]
    if varying:
        receipts.append(_choices(rehearsal, varying))
    free = [path for path, layer in ran.items() if isinstance(layer, Mixture) and layer.free is not None]
    if free:
        receipts.append(_free(rehearsal, free))
    limited = {path: layer for path, layer in ran.items() if isinstance(layer, Mixture) and _limits(layer)}
    if limited:
        receipts.append(_capacity(rehearsal, limited))
    return receipts


def _limits(layer: Mixture) -> bool:
    return layer.capacity is not None and layer.capacity.factor(training=True) is not None


def _gate(rehearsal: Rehearsal, name: str, pairs: dict[str, tuple[Gate, Gate]]) -> Receipt:
    """Compare the logits of two gates in each layer: with the switch, and without."""
    switch = Switch(f"gate.{name}", "routing")
    found: list[float] = []
    for path, (gate, neutral) in pairs.items():
        moved = rehearsal.compare(path, "gate", gate, neutral, read=lambda plan: plan.logits_TE)
        if moved != moved:
            return switch.is_("unproven", "a router's logits are not finite at this step")
        if not moved > 0 and bool(rehearsal.layer(path).logits_TE.any()):
            return switch.dead(
                f"{path} gives the same logits without its {switch.name}",
                f"let the router score by `gate.logits`, or leave {name} of its gate at its default",
                0.0,
            )
        found.append(moved)
    if not max(found) > 0:
        return switch.is_("idle", "every logit is 0 here, with it and without it", 0.0)
    least = min(found)
    evidence = f"without it the logits of each of {len(found)} routers change by {least:.2g} of their size or more"
    return switch.is_("alive", evidence, least)


def _choices(rehearsal: Rehearsal, varying: list[str]) -> Receipt:
    switch, found = Switch("router.choices", "routing"), []
    for path in varying:
        plan = rehearsal.calls[path].output
        assert isinstance(plan, PairPlan)
        used_T = torch.zeros_like(plan.modality_T).index_add(0, plan.token_N, plan.chosen_N.to(torch.int64))
        found.append(used_T[plan.valid_T])
    used = torch.cat(found)
    if not len(used):
        return switch.is_("unproven", "no token was routed by such a router on this batch")
    least, most, mean = int(used.min()), int(used.max()), float(used.float().mean())
    evidence = f"tokens use {least} to {most} experts, {mean:.2f} on average, by {len(varying)} routers"
    return switch.is_("alive" if least < most else "idle", evidence, mean)


def _free(rehearsal: Rehearsal, paths: list[str]) -> Receipt:
    switch, chosen, taken = Switch("moe.free", "routing"), 0, 0
    for path in paths:
        layer, load_E = (
            rehearsal.module.get_submodule(path),
            rehearsal.calls[path].output.plans[0].plan.chosen_loads()[0],
        )
        assert isinstance(layer, Mixture)
        chosen += int(load_E.sum())
        taken += int(load_E[layer.num_experts :].sum())
    if not chosen:
        return switch.is_("unproven", "no layer with it chose experts on this batch")
    evidence = f"{taken} of {chosen} choices of {len(paths)} layers go to free experts"
    return switch.is_("alive" if taken else "idle", evidence, taken / chosen)


def _capacity(rehearsal: Rehearsal, layers: dict[str, Mixture]) -> Receipt:
    switch, dropped, pairs = Switch("moe.capacity", "routing"), 0, 0
    for path, layer in layers.items():
        plan = rehearsal.calls[path].output.plans[0].plan
        if not isinstance(plan, PairPlan):  # slots are never over it
            continue
        chosen = int(plan.chosen_loads()[0].sum())
        lost = chosen - int(plan.kept_N.sum())
        assert layer.capacity is not None
        if not lost:
            tight = replace(layer.capacity, train_factor=_NEXT_TO_NONE, multiple_of=1)
            with replace_attribute(layer, "capacity", tight):
                kept_N = rehearsal.layer(path).plans[0].plan.kept_N
            if chosen and torch.equal(kept_N, plan.kept_N):
                return switch.dead(
                    f"{path} keeps every pair under a capacity of one place per expert",
                    "let the layer limit its plan by its capacity, or set its capacity to null",
                    0.0,
                )
        dropped += lost
        pairs += chosen
    if not pairs:
        return switch.is_("unproven", "no layer with it chose experts on this batch")
    evidence = f"it drops {dropped} of {pairs} pairs of {len(layers)} layers"
    return switch.is_("alive" if dropped else "idle", evidence, dropped / pairs)
