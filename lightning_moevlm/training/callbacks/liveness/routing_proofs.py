"""Proof of a switch of the routing: without it, the layers that it acts in route these very tokens otherwise.

    gate.jitter, gate.dropout   the router's logits with the noise, and without any
    gate.temperature            the router's logits with it, and with a temperature of 1
    moe.capacity                it leaves pairs out here; where it does not, next to none at all does, so that the layer
                                is known to keep to its capacity

Each router, or layer, runs again on what it was given in the rehearsal, and each that has the switch must show it.
Logits of a plan are those before a router's own noise and bias, so that these do not stand in for the gate's.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from lightning_moevlm.contracts.routing_plan import PairPlan
from lightning_moevlm.model.layers import MoEFFN
from lightning_moevlm.model.routers import Gate, Router
from lightning_moevlm.training.callbacks.liveness.receipt import Receipt, Verdict
from lightning_moevlm.training.callbacks.liveness.rehearsal import Rehearsal, put
from lightning_moevlm.training.callbacks.liveness.trunk_proofs import difference

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
    limited = {path: layer for path, layer in ran.items() if isinstance(layer, MoEFFN) and _limits(layer)}
    if limited:
        receipts.append(_capacity(rehearsal, limited))
    return receipts


def _limits(layer: MoEFFN) -> bool:
    return layer.capacity is not None and layer.capacity.factor(training=True) is not None


def _gate(rehearsal: Rehearsal, name: str, pairs: dict[str, tuple[Gate, Gate]]) -> Receipt:
    """Compare the logits of two gates in each layer: with the switch, and without."""
    switch = f"gate.{name}"
    found: list[float] = []
    for path, gates in pairs.items():
        router = rehearsal.module.get_submodule(path)
        logits = []
        for gate in gates:
            with put(router, "gate", gate):
                logits.append(rehearsal.layer(path).logits_TE)
        moved = difference(*logits)
        if moved != moved:
            return Receipt(switch, "routing", "unproven", "a router's logits are no numbers at this step")
        if not moved > 0 and bool(logits[0].any()):
            return Receipt(
                switch,
                "routing",
                "dead",
                f"{path} gives the same logits without its {switch}",
                0.0,
                f"let the router score by `gate.logits`, or leave {name} of its gate at its default",
            )
        found.append(moved)
    if not max(found) > 0:
        return Receipt(switch, "routing", "idle", "every logit is 0 here, with it and without it", 0.0)
    what = f"without it the logits of each of {len(found)} routers change by {min(found):.2g} of their size or more"
    return Receipt(switch, "routing", "alive", what, min(found))


def _capacity(rehearsal: Rehearsal, layers: dict[str, MoEFFN]) -> Receipt:
    switch, dropped, pairs = "moe.capacity", 0, 0
    for path, layer in layers.items():
        plan = rehearsal.calls[path].output.plans[0].plan
        if not isinstance(plan, PairPlan):  # slots are never over it
            continue
        chosen = int(plan.chosen_load(plan.valid_T).sum())
        lost = chosen - int(plan.kept_N.sum())
        assert layer.capacity is not None
        if not lost:
            with put(layer, "capacity", replace(layer.capacity, train_factor=_NEXT_TO_NONE, multiple_of=1)):
                tight = rehearsal.layer(path).plans[0].plan
            if chosen and torch.equal(tight.kept_N, plan.kept_N):
                return Receipt(
                    switch,
                    "routing",
                    "dead",
                    f"{path} keeps every pair under a capacity of one place per expert",
                    0.0,
                    "let the layer limit its plan by its capacity, or set its capacity to null",
                )
        dropped += lost
        pairs += chosen
    if not pairs:
        return Receipt(switch, "routing", "unproven", "no layer with it chose experts on this batch")
    verdict: Verdict = "alive" if dropped else "idle"
    return Receipt(
        switch, "routing", verdict, f"it leaves out {dropped} of {pairs} pairs of {len(layers)} layers", dropped / pairs
    )
