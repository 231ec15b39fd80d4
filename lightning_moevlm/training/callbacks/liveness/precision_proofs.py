"""Proof of a pinned dtype: with the region left to the Trainer's precision, the same samples give another loss.

The pin is idle if the Trainer computes in that dtype anyway. It is also idle if both dtypes give the same bits, as in
small models (a norm of fp32 tokens is fp32 under autocast too), but a trigger changes the outputs: the region alone
rounded to two bits of mantissa. Without an effect of the trigger the pin is dead. It is off if nothing computes in the
region and the pin is the policy's default, which guards routers of models that may have none.

Optimiser state is read directly: after each step it must hold numbers of the narrow format.
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
    rounded,
    use_precision,
)
from lightning_moevlm.training.callbacks.liveness.receipt import Receipt, Switch
from lightning_moevlm.training.callbacks.liveness.rehearsal import Rehearsal
from lightning_moevlm.training.half_precision import TRAINER_DTYPE

_COARSE: RegionDtype = "float8_e5m2"  # the fewest bits that can be simulated


class _Shift(NamedTuple):
    """Absolute differences of two runs of the same samples."""

    logits: float
    loss: float

    @property
    def text(self) -> str:
        return f"router logits by up to {self.logits:.2g}, the loss by {self.loss:.2g}"


def precision_receipts(rehearsal: Rehearsal, trainer: Trainer) -> list[Receipt]:
    """Return the receipts of the regions whose dtype the policy pins."""
    policy = rehearsal.module.precision
    around = TRAINER_DTYPE.get(str(trainer.precision), "float32")
    receipts: list[Receipt] = []
    seen: ObjectiveOutput | None = None
    for name in REGIONS:
        dtype = getattr(policy, name)
        if dtype is None:
            continue
        switch = Switch(f"precision.{name}", "precision")
        without = (policy.trunk if name != "trunk" else None) or around
        if name == "optimizer_state":
            receipts.append(_state(rehearsal, trainer, switch))
        elif dtype == without:
            receipts.append(switch.is_("idle", f"{dtype} is the dtype around it anyway"))
        else:
            seen = seen or rehearsal.run_again()
            # weights of a region pinned to fp32 stay fp32 in true half precisions, and would not fit the tokens
            free = policy.with_region(name, without if str(trainer.precision).endswith("-true") else None)
            receipts.append(_region(rehearsal, seen, switch, name, free, f"{dtype} instead of {without}"))
    return receipts


def _region(
    rehearsal: Rehearsal, seen: ObjectiveOutput, switch: Switch, name: Region, without: PrecisionPolicy, change: str
) -> Receipt:
    shift = _shift(seen, _run_as(rehearsal, without))
    if shift.loss != shift.loss:  # the samples' own loss is finite, or there would be no receipts
        return switch.is_("alive", f"{change}: without the pin the loss is not finite")
    if any(shift):
        return switch.is_("alive", f"{change} moves {shift.text}", shift.loss)
    shaken = _trigger(rehearsal, without, name)
    same = f"{change} changes no bit of these samples"
    if any(shaken):
        return switch.is_("idle", f"{same}; on a trial {_COARSE} moves {shaken.text}", 0.0)
    if getattr(PrecisionPolicy(), name) == getattr(rehearsal.module.precision, name):
        return switch.is_("off", "the default of a region in which this model computes nothing", 0.0)
    return switch.dead(
        f"{same}, nor does {_COARSE} on a trial: the outputs do not depend on this region",
        f"set model.{switch.name} to null",
        0.0,
    )


def _trigger(rehearsal: Rehearsal, without: PrecisionPolicy, name: Region) -> _Shift:
    """Return the effect of rounding one region as coarsely as possible; both runs are simulated."""
    free = replace(without, simulate=without.simulate or Simulation())
    return _shift(_run_as(rehearsal, free), _run_as(rehearsal, free.with_region(name, _COARSE)))


def _run_as(rehearsal: Rehearsal, policy: PrecisionPolicy) -> ObjectiveOutput:
    with use_precision(rehearsal.module, policy):
        return rehearsal.run_again()


def _shift(one: ObjectiveOutput, other: ObjectiveOutput) -> _Shift:
    pairs = zip(_logits(one), _logits(other), strict=True)
    logits = max((float((ours - theirs).abs().max()) for ours, theirs in pairs if ours.numel()), default=0.0)
    return _Shift(logits, abs(_task_loss(one) - _task_loss(other)))


def _state(rehearsal: Rehearsal, trainer: Trainer, switch: Switch) -> Receipt:
    policy = rehearsal.module.precision
    dtype = policy.optimizer_state
    assert dtype is not None
    if dtype == "float32" or policy.simulate is None:
        return switch.is_("idle", "the optimiser's state is float32 anyway")
    state = [
        value
        for optimizer in trainer.optimizers
        for values in optimizer.state.values()
        for value in values.values()
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 1
    ]
    if not state:
        return switch.is_("idle", "no step has left state to round yet")
    loose = sum(not _is_rounded(value, dtype, policy.simulate.scale) for value in state)
    if loose:
        return switch.dead(
            f"{loose} of {len(state)} tensors of the optimiser's state do not hold numbers of {dtype}",
            f"choose an optimiser whose state can be rounded after each step, or set model.{switch.name} to null",
            float(loose),
        )
    return switch.is_("alive", f"all {len(state)} state tensors are {dtype}", float(len(state)))


def _is_rounded(value: Tensor, dtype: RegionDtype, scale: bool) -> bool:
    """Return whether state holds numbers of a format, up to the last bits of the dtype that stores it.

    The scale of fp8 is itself rounded, so rounding twice may move the last bit.
    """
    kept_in = torch.finfo(value.dtype)
    again = rounded(value.float(), dtype, scale).to(value.dtype)
    return torch.allclose(again, value, rtol=4 * kept_in.eps, atol=kept_in.smallest_normal * kept_in.eps)


def _task_loss(output: ObjectiveOutput) -> float:
    return sum(float(term.weighted) for term in output.terms.values())


def _logits(output: ObjectiveOutput) -> list[Tensor]:
    plans: list[RoutingPlan] = [named.plan for named in output.plans]
    return [plan.logits_TE for plan in plans]
