"""Proof of a pinned dtype: with the region left to the Trainer's precision, the same samples give another loss.

Where the Trainer computes in that dtype anyway the pin is idle. The state of an optimiser is looked at itself: what is
rounded after each step must be made of numbers of the narrow format.
"""

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_moevlm.callbacks.liveness.receipt import Receipt
from lightning_moevlm.callbacks.liveness.rehearsal import Rehearsal
from lightning_moevlm.plans import RoutingPlan
from lightning_moevlm.precision import REGIONS, Region, precision_as, rounded
from lightning_moevlm.records import ObjectiveOutput

_TRAINER_DTYPE = {"bf16-mixed": "bfloat16", "bf16-true": "bfloat16", "16-mixed": "float16", "16-true": "float16"}


def precision_receipts(rehearsal: Rehearsal, trainer: Trainer) -> list[Receipt]:
    """Return the receipts of the regions whose dtype the policy pins."""
    policy = rehearsal.module.precision
    around = _TRAINER_DTYPE.get(str(trainer.precision), "float32")
    receipts: list[Receipt] = []
    seen: ObjectiveOutput | None = None
    for name in REGIONS:
        dtype = getattr(policy, name)
        if dtype is None:
            continue
        switch = f"precision.{name}"
        without = (policy.trunk if name != "trunk" else None) or around
        if name == "optimizer_state":
            receipts.append(_state(rehearsal, trainer, switch))
        elif dtype == without:
            receipts.append(Receipt(switch, "precision", "idle", f"{dtype} is what is computed in around it"))
        else:
            seen = seen or rehearsal.once_more()
            receipts.append(_region(rehearsal, seen, name, f"{dtype} instead of {without}"))
    return receipts


def _region(rehearsal: Rehearsal, seen: ObjectiveOutput, name: Region, what: str) -> Receipt:
    switch = f"precision.{name}"
    module = rehearsal.module
    with precision_as(module, module.precision.with_region(name, None)):
        without = rehearsal.once_more()
    loss = abs(_task_loss(seen) - _task_loss(without))
    logits = max(
        (float((ours - theirs).abs().max()) for ours, theirs in zip(_logits(seen), _logits(without), strict=True)),
        default=0.0,
    )
    if loss != loss:
        return Receipt(switch, "precision", "unproven", "the loss is no number at this step")
    if loss or logits:
        return Receipt(
            switch,
            "precision",
            "alive",
            f"{what} moves router logits by up to {logits:.2g}, the loss by {loss:.2g}",
            loss,
        )
    if name == "losses" or name == "heads":
        # sums of few terms may agree to the last bit
        return Receipt(switch, "precision", "idle", f"{what} gives the same loss for these samples", 0.0)
    return Receipt(
        switch,
        "precision",
        "dead",
        f"{what} gives the same logits and loss to the last bit: the region is computed in one dtype either way",
        0.0,
        f"set model.{switch} to null",
    )


def _state(rehearsal: Rehearsal, trainer: Trainer, switch: str) -> Receipt:
    policy = rehearsal.module.precision
    dtype = policy.optimizer_state
    assert dtype is not None
    if dtype == "float32" or policy.simulate is None:
        return Receipt(switch, "precision", "idle", "float32 is what the optimiser's state has")
    state = [
        value
        for optimizer in trainer.optimizers
        for values in optimizer.state.values()
        for value in values.values()
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 1
    ]
    if not state:
        return Receipt(switch, "precision", "idle", "no step has been made that left state to round")
    loose = sum(not torch.equal(rounded(value, dtype, policy.simulate.scale), value) for value in state)
    if loose:
        return Receipt(
            switch,
            "precision",
            "dead",
            f"{loose} of {len(state)} tensors of the optimiser's state are no numbers of {dtype}",
            float(loose),
            f"choose an optimiser whose state can be rounded after each step, or set model.{switch} to null",
        )
    return Receipt(switch, "precision", "alive", f"all {len(state)} state tensors are {dtype}", float(len(state)))


def _task_loss(output: ObjectiveOutput) -> float:
    return sum(float(term.weighted) for term in output.terms.values())


def _logits(output: ObjectiveOutput) -> list[Tensor]:
    plans: list[RoutingPlan] = [named.plan for named in output.plans]
    return [plan.logits_TE for plan in plans]
