"""Proof of a pinned dtype: with the region left to the Trainer's precision, the same samples give another loss.

Where the Trainer computes in that dtype anyway the pin is idle. So it is where both dtypes give the same bits, as they
may in a small model (a norm of fp32 tokens is fp32 under autocast too), if a trigger shows that the model asks for the
dtype of the region: rounded to two bits of mantissa there, and nowhere else, the samples must give other numbers. What
does not answer to that is dead; or off, if nothing computes in the region and the pin is the policy's default, which
guards a router of a model that may have none.

The state of an optimiser is looked at itself: what is rounded after each step must be made of numbers of the narrow
format.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_moevlm.contracts.routing_plan import RoutingPlan
from lightning_moevlm.contracts.step_records import ObjectiveOutput
from lightning_moevlm.model.precision import (
    REGIONS,
    PrecisionPolicy,
    Region,
    RegionDtype,
    Simulation,
    precision_as,
    rounded,
)
from lightning_moevlm.training.callbacks.liveness.receipt import Receipt
from lightning_moevlm.training.callbacks.liveness.rehearsal import Rehearsal

_TRAINER_DTYPE: dict[str, RegionDtype] = {
    "bf16-mixed": "bfloat16",
    "bf16-true": "bfloat16",
    "16-mixed": "float16",
    "16-true": "float16",
}

_COARSE: RegionDtype = "float8_e5m2"  # the fewest bits that can be simulated


class _Shift(NamedTuple):
    """By how much two runs of the same samples differ."""

    logits: float
    loss: float

    @property
    def text(self) -> str:
        return f"router logits by up to {self.logits:.2g}, the loss by {self.loss:.2g}"


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
            seen = seen or rehearsal.run_again()
            # weights of a region pinned to fp32 stay fp32 in true half precisions, and would not fit the tokens
            free = policy.with_region(name, without if str(trainer.precision).endswith("-true") else None)
            receipts.append(_region(rehearsal, seen, name, free, f"{dtype} instead of {without}"))
    return receipts


def _region(rehearsal: Rehearsal, seen: ObjectiveOutput, name: Region, without: PrecisionPolicy, what: str) -> Receipt:
    switch = f"precision.{name}"
    policy = rehearsal.module.precision
    shift = _shift(seen, _run_as(rehearsal, without))
    if shift.loss != shift.loss:
        # the samples' own loss is sound, or nobody would have asked
        return Receipt(switch, "precision", "alive", f"{what}: without the pin the loss is no number")
    if any(shift):
        return Receipt(switch, "precision", "alive", f"{what} moves {shift.text}", shift.loss)
    shaken = _trigger(rehearsal, without, name)
    same = f"{what} changes no bit of these samples"
    if any(shaken):
        evidence = f"{same}; on a trial {_COARSE} moves {shaken.text}"
        return Receipt(switch, "precision", "idle", evidence, 0.0)
    if getattr(PrecisionPolicy(), name) == getattr(policy, name):
        return Receipt(switch, "precision", "off", "the default of a region in which this model computes nothing", 0.0)
    return Receipt(
        switch,
        "precision",
        "dead",
        f"{same}, and no more does {_COARSE} on a trial: nothing that counts is computed in the region",
        0.0,
        f"set model.{switch} to null",
    )


def _trigger(rehearsal: Rehearsal, without: PrecisionPolicy, name: Region) -> _Shift:
    """Return what it changes to round one region as coarsely as can be; both runs of the samples are simulated."""
    free = replace(without, simulate=without.simulate or Simulation())
    return _shift(_run_as(rehearsal, free), _run_as(rehearsal, free.with_region(name, _COARSE)))


def _run_as(rehearsal: Rehearsal, policy: PrecisionPolicy) -> ObjectiveOutput:
    with precision_as(rehearsal.module, policy):
        return rehearsal.run_again()


def _shift(one: ObjectiveOutput, other: ObjectiveOutput) -> _Shift:
    pairs = zip(_logits(one), _logits(other), strict=True)
    logits = max((float((ours - theirs).abs().max()) for ours, theirs in pairs if ours.numel()), default=0.0)
    return _Shift(logits, abs(_task_loss(one) - _task_loss(other)))


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
    loose = sum(not _is_rounded(value, dtype, policy.simulate.scale) for value in state)
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


def _is_rounded(value: Tensor, dtype: RegionDtype, scale: bool) -> bool:
    """Say whether state is made of numbers of a format, up to the last bits of the dtype that it is kept in.

    The factor that fp8 is scaled by is itself rounded, so that rounding twice may move the last bit.
    """
    kept_in = torch.finfo(value.dtype)
    again = rounded(value.float(), dtype, scale).to(value.dtype)
    return torch.allclose(again, value, rtol=4 * kept_in.eps, atol=kept_in.smallest_normal * kept_in.eps)


def _task_loss(output: ObjectiveOutput) -> float:
    return sum(float(term.weighted) for term in output.terms.values())


def _logits(output: ObjectiveOutput) -> list[Tensor]:
    plans: list[RoutingPlan] = [named.plan for named in output.plans]
    return [plan.logits_TE for plan in plans]
