"""Keeps the current optimiser step, and saves it, so that a checkpoint within an accumulation resumes exactly.

Between two optimiser steps training holds more than weights: gradients of the micro-batches done, their losses, and
facts of their routing and attention. Lightning saves none of these and continues with the next micro-batch, so a
resumed run would take one step on a part of its samples.

Every rank's part is saved, so the same number of ranks resumes bit for bit. Another number of ranks gets the mean of
the parts, which keeps the exchanged mean except for rounding.
"""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NotRequired, TypedDict

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.objectives import Objective
from lightning_moevlm.training.actions import ActionRunner
from lightning_moevlm.training.actions.step_facts import CollectedFacts
from lightning_moevlm.training.checks.trainer_checks import SHARDING
from lightning_moevlm.training.step.routing_counts import RoutingCounter
from lightning_moevlm.training.step.step_size import StepSizeMeter


class PartialStep(TypedDict):
    """State within an accumulation."""

    micro_batches: int
    """Of a whole step."""
    gradients: list[dict[str, Tensor]]
    """Of each rank, by parameter."""
    losses: Tensor
    """Task loss of each micro-batch done, by rank (ranks, n)."""
    size: NotRequired[Tensor | None]
    """Of the whole step, if known ahead."""
    routing: dict[str, Tensor]
    """Counts so far, over all ranks."""
    facts: CollectedFacts | None
    """Facts for actions so far."""


class StepInProgress:
    """The optimiser step that is being taken, apart from gradients and the facts for actions."""

    def __init__(self, backbone: Backbone, objective: Objective) -> None:
        self.losses: list[Tensor] = []  # of the task, of each micro-batch done
        self.size = StepSizeMeter(objective)
        self.routing = RoutingCounter(backbone)

    def save(self, module: LightningModule, runner: ActionRunner | None) -> PartialStep:
        """Return all of the step so far; all ranks must call it together."""
        trainer, device = module.trainer, module.device
        gather = partial(_gather_ranks, trainer=trainer)
        return PartialStep(
            micro_batches=trainer.accumulate_grad_batches,
            gradients=_gradients_of(module, trainer),
            losses=gather(torch.stack(self.losses)),
            size=self.size.state(module.global_step),
            routing=self.routing.state(partial(trainer.strategy.reduce, reduce_op="sum"), device),
            facts=None if runner is None else runner.collect_partial_step(trainer, device, gather),
        )

    def restore(self, saved: PartialStep, module: LightningModule, runner: ActionRunner | None) -> None:
        """Continue a step, after the module has moved to the training device.

        Raises:
            UserError: another number of micro-batches.
        """
        trainer, device, step = module.trainer, module.device, module.global_step
        _refuse_other_accumulation(saved, trainer)
        restore_gradients(module, saved["gradients"], trainer)
        self.losses = list(_select_rank(saved["losses"], trainer).to(device))
        self.size.restore(step, saved.get("size"))
        if module.global_rank == 0:  # counts of all ranks, which will be summed
            self.routing.restore(step, {layer: counts.to(device) for layer, counts in saved["routing"].items()})
        if runner is not None and saved["facts"] is not None:
            runner.restore_partial_step(saved["facts"], device, partial(_select_rank, trainer=trainer))


def _gather_ranks(tensor: Tensor, trainer: Trainer) -> Tensor:
    """Return a tensor of equal shape on all ranks as (ranks, ...) on the CPU; all ranks must call it."""
    if trainer.world_size == 1:
        return tensor.detach().unsqueeze(0).cpu()
    of_ranks = trainer.strategy.all_gather(tensor.detach().to(trainer.strategy.root_device))
    assert isinstance(of_ranks, Tensor)
    return of_ranks.cpu()


def _select_rank(of_ranks: Tensor, trainer: Trainer) -> Tensor:
    """Return this rank's part of (ranks, ...), or the mean if the number of ranks differs."""
    return of_ranks[trainer.global_rank] if len(of_ranks) == trainer.world_size else of_ranks.mean(dim=0)


def _gradients_of(module: nn.Module, trainer: Trainer) -> list[dict[str, Tensor]]:
    """Return the gradients so far of each rank, by parameter name; all ranks must call it together."""
    if isinstance(trainer.strategy, SHARDING):
        warnings.warn(
            f"a checkpoint within an accumulation lacks gradients, because {type(trainer.strategy).__name__} shards "
            "them; save between steps (every_n_train_steps) to resume exactly",
            stacklevel=2,
        )
        return []
    parameters = {name: each for name, each in module.named_parameters() if each.requires_grad}
    # a rank whose batches had no text has no gradient there, and the others wait for it
    has_gradient = torch.tensor([int(each.grad is not None) for each in parameters.values()], dtype=torch.int64)
    has_rank = _gather_ranks(has_gradient, trainer)
    gradients: list[dict[str, Tensor]] = [{} for _ in has_rank]
    for (name, each), has_R in zip(parameters.items(), has_rank.unbind(dim=1), strict=True):
        if bool(has_R.any()):
            of_ranks = _gather_ranks(torch.zeros_like(each) if each.grad is None else each.grad, trainer)
            for mine, gradient, has in zip(gradients, of_ranks.unbind(), has_R.tolist(), strict=True):
                if has:
                    mine[name] = gradient
    return gradients


def restore_gradients(module: nn.Module, gradients: Sequence[Mapping[str, Tensor]], trainer: Trainer) -> None:
    """Put gradients back, after the parameters have moved to the training device."""
    for name, parameter in module.named_parameters():
        here = [mine.get(name) for mine in gradients]
        if len(gradients) == trainer.world_size:
            gradient = here[trainer.global_rank]
        else:
            there = [each for each in here if each is not None]
            gradient = torch.stack(there).sum(dim=0) / len(gradients) if there else None
        if gradient is not None:
            parameter.grad = gradient.to(parameter)


def _refuse_other_accumulation(saved: PartialStep, trainer: Trainer) -> None:
    """Refuse to complete a step with another number of micro-batches."""
    if saved["micro_batches"] != trainer.accumulate_grad_batches:
        raise UserError(
            f"the checkpoint was saved within an accumulation over {saved['micro_batches']} micro-batches, but "
            f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}: its step cannot be completed; "
            f"resume with {saved['micro_batches']}, or from a checkpoint between steps"
        )
