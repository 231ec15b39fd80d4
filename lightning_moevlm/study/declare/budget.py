"""Budgets of a run, in one of four measures; three become a number of optimiser steps before anything starts.

max_steps      optimiser steps
samples        steps = samples // (batch x world size x accumulation)
active_flops   steps = FLOPs // (3 x active forward FLOPs per sample x samples per step): a backward pass costs two
               forward ones, as usual in scaling laws; per sample as in the model card, heads left out
minutes        of training time, by the clock: the steps depend on the machine and on what else it does
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.declare.decode import Positive, Record, Whole, doc
from lightning_moevlm.study.declare.yaml_nodes import YamlNode

if TYPE_CHECKING:  # it lies beside the models, which import torch
    from lightning_moevlm.contracts.model_card import ModelCard

_FORWARD_AND_BACKWARD = 3


class Budget(Record, frozen=True):
    """Exactly one of these."""

    max_steps: Annotated[Whole | None, doc("Optimiser steps of a run.", "60")] = None
    samples: Annotated[
        Whole | None, doc("Training samples of a run. Its steps follow from the batch size.", "1920")
    ] = None
    active_flops: Annotated[
        Positive | None,
        doc("FLOPs of a run, forward and backward, of the parameters that a token uses. Steps follow.", "1.0e+12"),
    ] = None
    minutes: Annotated[Positive | None, doc("Minutes of training of a run, by the clock.", "5")] = None

    @property
    def text(self) -> str:
        """The budget of one run in words."""
        if self.minutes is not None:
            return f"{self.minutes:g} minutes"
        if self.active_flops is not None:
            return f"{self.active_flops:g} active FLOPs"
        return f"{self.max_steps} steps" if self.samples is None else f"{self.samples:,} samples"

    @property
    def max_time(self) -> str:
        """The minutes as Lightning's `trainer.max_time`: days:hours:minutes:seconds."""
        assert self.minutes is not None
        minutes, seconds = divmod(round(60 * self.minutes), 60)
        hours, minutes = divmod(minutes, 60)
        days, hours = divmod(hours, 24)
        return f"{days:02}:{hours:02}:{minutes:02}:{seconds:02}"

    def steps(self, resolved: Mapping[str, Any], card: "ModelCard") -> int:
        """Return the optimiser steps that samples or FLOPs allow with a configuration and its model.

        Raises:
            UserError: The budget is less than one step.
        """
        per_step = samples_per_step(resolved)
        assert per_step is not None, "the data module has no default for batch_size"
        if self.samples is not None:
            steps, cost = self.samples // per_step, f"{per_step:,} samples"
        else:
            assert self.active_flops is not None
            flops = _FORWARD_AND_BACKWARD * card.active_flops_per_sample * per_step
            steps, cost = int(self.active_flops // flops), f"{flops:g} active FLOPs"
        if steps < 1:
            raise UserError(f"a budget of {self.text} is less than one step, which takes {cost}; raise it")
        return steps


def check_budget(budget: Budget, node: YamlNode) -> None:
    """Refuse a budget of none or several measures, or of less than a second.

    Raises:
        UserError: One line with file, line, key and what is allowed.
    """
    given = [name for name in budget.__struct_fields__ if getattr(budget, name) is not None]
    if len(given) != 1:
        allowed = ", ".join(budget.__struct_fields__)
        raise node.error(f"a budget has exactly one of {allowed}; got {', '.join(given) or 'none'}")
    if budget.minutes is not None and round(60 * budget.minutes) < 1:
        raise node.child("minutes").error(f"{budget.minutes:g} minutes are less than a second; give at least 0.02")


def samples_per_step(resolved: Mapping[str, Any]) -> int | None:
    """Return batch x world size x accumulation of a resolved configuration; None if it has no batch size."""
    data, trainer = resolved.get("data") or {}, resolved.get("trainer") or {}
    batch = data.get("batch_size")
    if not isinstance(batch, int):
        return None
    nodes, accumulation = trainer.get("num_nodes") or 1, trainer.get("accumulate_grad_batches") or 1
    return int(batch * _num_devices(trainer.get("devices") or "auto") * nodes * accumulation)


def _num_devices(devices: object) -> int:
    """Return the number of devices of a run; "auto" and -1 mean all visible ones, and a sweep shows each run one."""
    if isinstance(devices, list):
        return len(devices)
    text = str(devices)
    if text in ("auto", "-1"):
        return 1
    return int(text) if text.isdigit() else len([part for part in text.split(",") if part.strip()])
