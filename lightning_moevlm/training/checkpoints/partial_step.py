"""Saves and restores a partial step, so that a checkpoint within an accumulation resumes exactly.

Between two optimiser steps training holds more than weights: gradients of the micro-batches done, their losses, and
facts of their routing and attention. Lightning saves none of these and continues with the next micro-batch, so a
resumed run would take one step on a part of its samples.

Every rank's part is saved, so the same number of ranks resumes bit for bit. Another number of ranks gets the mean of
the parts, which keeps the exchanged mean except for rounding.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import NotRequired, TypedDict

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.training.actions.step_facts import CollectedFacts
from lightning_moevlm.training.checks.trainer_checks import SHARDING


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


def gather_ranks(tensor: Tensor, trainer: Trainer) -> Tensor:
    """Return a tensor of equal shape on all ranks as (ranks, ...) on the CPU; all ranks must call it."""
    if trainer.world_size == 1:
        return tensor.detach().unsqueeze(0).cpu()
    of_ranks = trainer.strategy.all_gather(tensor.detach().to(trainer.strategy.root_device))
    assert isinstance(of_ranks, Tensor)
    return of_ranks.cpu()


def select_rank(of_ranks: Tensor, trainer: Trainer) -> Tensor:
    """Return this rank's part of (ranks, ...), or the mean if the number of ranks differs."""
    return of_ranks[trainer.global_rank] if len(of_ranks) == trainer.world_size else of_ranks.mean(dim=0)


def gradients_of(module: nn.Module, trainer: Trainer) -> list[dict[str, Tensor]]:
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
    has_rank = gather_ranks(has_gradient, trainer)
    gradients: list[dict[str, Tensor]] = [{} for _ in has_rank]
    for (name, each), has_R in zip(parameters.items(), has_rank.unbind(dim=1), strict=True):
        if bool(has_R.any()):
            of_ranks = gather_ranks(torch.zeros_like(each) if each.grad is None else each.grad, trainer)
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


def refuse_other_accumulation(saved: PartialStep, trainer: Trainer) -> None:
    """Refuse to complete a step with another number of micro-batches."""
    if saved["micro_batches"] != trainer.accumulate_grad_batches:
        raise UserError(
            f"the checkpoint was saved within an accumulation over {saved['micro_batches']} micro-batches, but "
            f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}: its step cannot be completed; "
            f"resume with {saved['micro_batches']}, or from a checkpoint between steps"
        )
