"""A step half done: what a checkpoint that is saved amid an accumulation keeps, so that the step ends as it would have.

Between two optimiser steps training holds more than weights: the gradients of the micro-batches done, their losses, and
what routers and attention layers did in them. Lightning saves none of that and goes on with the next micro-batch, so a
resumed run would take one step on a part of its samples.

Every rank's own part is saved, so that as many ranks go on to the bit. Fewer or more of them all get the mean of those
parts, which leaves the mean that they will exchange what it was, but for rounding.
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
    """micro_batches: of a whole step. gradients: of each rank, by parameter. losses: of the task, one per micro-batch
    done, by rank (ranks, n). size: of the whole step, where it was known ahead. routing: counts over all ranks so far.
    facts: what actions ask for, so far.
    """

    micro_batches: int
    gradients: list[dict[str, Tensor]]
    losses: Tensor
    size: NotRequired[Tensor | None]
    routing: dict[str, Tensor]
    facts: CollectedFacts | None


def gather_ranks(tensor: Tensor, trainer: Trainer) -> Tensor:
    """Return a tensor of equal shape on all ranks as (ranks, ...), on the CPU; all ranks must ask together."""
    if trainer.world_size == 1:
        return tensor.detach().unsqueeze(0).cpu()
    of_ranks = trainer.strategy.all_gather(tensor.detach().to(trainer.strategy.root_device))
    assert isinstance(of_ranks, Tensor)
    return of_ranks.cpu()


def select_rank(of_ranks: Tensor, trainer: Trainer) -> Tensor:
    """Return this rank's own of (ranks, ...), or the mean where there were more or fewer ranks."""
    return of_ranks[trainer.global_rank] if len(of_ranks) == trainer.world_size else of_ranks.mean(dim=0)


def gradients_of(module: nn.Module, trainer: Trainer) -> list[dict[str, Tensor]]:
    """Return the gradients gathered so far by the parameter's name, of each rank; all ranks must ask together."""
    if isinstance(trainer.strategy, SHARDING):
        warnings.warn(
            f"a checkpoint was saved amid an accumulation, and {type(trainer.strategy).__name__} shards gradients over "
            "ranks: those so far are not in it; save when a step is done (every_n_train_steps), to resume exactly",
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
    """Put gradients back; to be called when the parameters are where they are trained."""
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
    """Refuse to complete a step of another number of micro-batches.

    Raises:
        UserError: with the number that it was.
    """
    if saved["micro_batches"] != trainer.accumulate_grad_batches:
        raise UserError(
            f"the checkpoint was saved amid an accumulation over {saved['micro_batches']} micro-batches, and "
            f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}: the step half done cannot be "
            f"completed; resume with {saved['micro_batches']}, or from a checkpoint that was saved when a step was done"
        )
