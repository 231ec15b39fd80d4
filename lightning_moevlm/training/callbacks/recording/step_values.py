"""Collects the quantities of an optimiser step from its micro-batches, on the device: the host never waits.

Losses and loads are added up over micro-batches, largest logits are compared.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.contracts.routing_plan import PairPlan
from lightning_moevlm.contracts.step_records import AttentionLogits, LossReport, NamedPlan
from lightning_moevlm.training import StepOutput


class Values(NamedTuple):
    """Some quantities with their values, fp32 (V)."""

    names: tuple[str, ...]
    values_V: Tensor


class StepCollector:
    """Collects the current step."""

    def __init__(self) -> None:
        self._losses: list[Values] = []
        self._largest: list[Values] = []
        self._loads: list[Values] = []

    @torch.no_grad()
    def add(self, outputs: StepOutput) -> None:
        """Add a micro-batch."""
        self._losses.append(_losses(outputs["report"]))
        self._largest.append(_largest(outputs["plans"], outputs["attention"], outputs["log_partitions"]))
        self._loads.append(_loads(outputs["plans"]))

    @torch.no_grad()
    def finish(self) -> list[Values]:
        """Return the losses of this rank, then the other quantities; begin a new step."""
        losses = _combine(self._losses, "sum")
        mean = losses._replace(values_V=losses.values_V / len(self._losses))
        others = [_combine(self._largest, "amax"), _combine(self._loads, "sum")]
        self._losses, self._largest, self._loads = [], [], []
        return [mean, *others]


def _losses(report: LossReport) -> Values:
    """Return the terms, and their weights: the host forms totals from them, which spares the step many small sums."""
    terms = {**report.task, **report.auxiliary}
    names = tuple(f"loss/{name}" for name in terms)
    parts = [term.raw if term.in_step is None else term.in_step for term in terms.values()]
    adapting = {name: term.weight for name, term in terms.items() if isinstance(term.weight, Tensor)}
    values = [each.float() for each in (*parts, *adapting.values())]
    return Values(names + tuple(f"loss_weight/{name}" for name in adapting), torch.stack(values))


def fixed_weights(report: LossReport) -> dict[str, float]:
    """Return the weights of the terms whose weight does not adapt."""
    terms = {**report.task, **report.auxiliary}
    return {f"loss_weight/{name}": term.weight for name, term in terms.items() if not isinstance(term.weight, Tensor)}


def add_totals(values: Mapping[str, float], task: Collection[str]) -> dict[str, float]:
    """Return the values with the weighted sum of the task terms, and that of all terms.

    Args:
        values: with every `loss/` and `loss_weight/`.
        task: names of the task terms.
    """
    terms = {name.removeprefix("loss/"): value for name, value in values.items() if name.startswith("loss/")}
    weighted = {term: value * values.get(f"loss_weight/{term}", 0.0) for term, value in terms.items()}
    task_loss = sum(value for term, value in weighted.items() if term in task)
    return {"task_loss": task_loss, "total_loss": sum(weighted.values()), **values}


def _largest(
    plans: Sequence[NamedPlan], attention: Iterable[AttentionLogits], log_partitions: Mapping[str, Tensor]
) -> Values:
    found: dict[str, Tensor] = {}
    full = [named for named in plans if named.plan.num_tokens]
    logits = [torch.where(named.plan.valid_T.unsqueeze(-1), named.plan.logits_TE, 0.0) for named in full]
    for named, value in zip(full, torch._foreach_norm(logits, math.inf) if logits else (), strict=True):
        _keep(found, f"router_logit/backbone.{named.layer}/{named.source}", value)
    for one in attention:
        _keep(found, f"attention_logit/backbone.{one.layer}/{one.source}", one.max_H.amax())
    for term, value_M in log_partitions.items():
        if value_M.numel():
            _keep(found, f"output_logit/{term}", value_M.abs().amax())
    return _stack(found)


def _keep(found: dict[str, Tensor], name: str, value: Tensor) -> None:
    found[name] = value if name not in found else found[name].maximum(value)


def _loads(plans: Sequence[NamedPlan]) -> Values:
    """Return the chosen pairs of each expert, all plans in one sum; shares are formed at the end of the step."""
    first: dict[str, int] = {}  # place of each layer's and pass's first expert in the sum
    names: list[str] = []
    places: list[Tensor] = []
    counted: list[Tensor] = []
    for named in plans:
        plan, where = named.plan, f"backbone.{named.layer}/{named.source}"
        if where not in first:
            first[where] = len(names)
            names += [f"load/{where}/expert{e}" for e in range(plan.num_experts)]
        if isinstance(plan, PairPlan):
            places.append(plan.expert_N + first[where])
            counted.append(plan.chosen_N)
        else:
            places.append(torch.arange(plan.num_experts, device=plan.logits_TE.device) + first[where])
            counted.append(plan.chosen_loads()[0])
    if not plans:
        return Values((), torch.zeros(0))
    values_V = torch.zeros(len(names), device=places[0].device)
    return Values(tuple(names), values_V.index_add_(0, torch.cat(places), torch.cat(counted).float()))


def _stack(found: Mapping[str, Tensor]) -> Values:
    return Values(tuple(found), torch.stack([each.float() for each in found.values()]) if found else torch.zeros(0))


def _combine(parts: Sequence[Values], how: str) -> Values:
    """Join the micro-batches; a quantity that one of them lacks is taken from the others."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if all(part.names == first.names for part in parts):
        return Values(first.names, _reduce(torch.stack([part.values_V for part in parts]), how))
    found: dict[str, list[Tensor]] = {}
    for names, values_V in parts:
        for name, value in zip(names, values_V.unbind(), strict=True):
            found.setdefault(name, []).append(value)
    return _stack({name: _reduce(torch.stack(values), how) for name, values in found.items()})


def _reduce(values: Tensor, how: str) -> Tensor:
    return values.amax(dim=0) if how == "amax" else values.sum(dim=0)


def to_shares(values: Mapping[str, float]) -> dict[str, float]:
    """Divide the loads of each layer and pass by their sum."""
    places = {name: name.rpartition("/")[0] for name in values if name.startswith("load/")}
    totals = dict.fromkeys(places.values(), 0.0)
    for name, place in places.items():
        totals[place] += values[name]
    return {**values, **{name: values[name] / max(totals[place], 1e-20) for name, place in places.items()}}
