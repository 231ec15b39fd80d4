"""A step half done: what a checkpoint that is saved amid an accumulation keeps, so that the step ends as it would have.

Between two optimiser steps training holds more than weights: the gradients of the micro-batches done, their losses, and
what routers and attention layers did in them. Lightning saves none of that and goes on with the next micro-batch, so a
resumed run would take one step on a part of its samples.

Of several ranks, means and sums are saved: the mean gradient is given to every rank, which leaves the mean that they
will exchange what it was, but for rounding, however many ranks there are then. In one process nothing is rounded.
"""

import warnings
from collections.abc import Mapping
from typing import TypedDict

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_moevlm.errors import UserError
from lightning_moevlm.training.actions.gather import Gathered
from lightning_moevlm.training.refusals import SHARDING


class HalfStep(TypedDict):
    """micro_batches: of a whole step. losses: of the task, one per micro-batch done (n). routing, facts: so far."""

    micro_batches: int
    gradients: dict[str, Tensor]
    losses: Tensor
    routing: dict[str, Tensor]
    facts: Gathered | None


def gradients_of(module: nn.Module, trainer: Trainer) -> dict[str, Tensor]:
    """Return the gradients gathered so far by the parameter's name, means over ranks; all ranks must ask together."""
    if isinstance(trainer.strategy, SHARDING):
        warnings.warn(
            f"a checkpoint was saved amid an accumulation, and {type(trainer.strategy).__name__} shards gradients over "
            "ranks: those so far are not in it; save when a step is done (every_n_train_steps), to resume exactly",
            stacklevel=2,
        )
        return {}
    parameters = {name: each for name, each in module.named_parameters() if each.requires_grad}
    if trainer.world_size == 1:
        return {name: each.grad for name, each in parameters.items() if each.grad is not None}
    # a rank whose batches had no text has no gradient there, and the others wait for it
    has_gradient = torch.tensor([int(each.grad is not None) for each in parameters.values()])
    num_with = trainer.strategy.reduce(has_gradient.to(trainer.strategy.root_device), reduce_op="sum").tolist()
    means = {}
    for (name, each), is_somewhere in zip(parameters.items(), num_with, strict=True):
        if is_somewhere:
            gradient = torch.zeros_like(each) if each.grad is None else each.grad.clone()
            means[name] = trainer.strategy.reduce(gradient, reduce_op="mean").cpu()
    return means


def restore_gradients(module: nn.Module, gradients: Mapping[str, Tensor]) -> None:
    """Put gradients back; to be called when the parameters are where they are trained."""
    for name, parameter in module.named_parameters():
        if name in gradients:
            parameter.grad = gradients[name].to(parameter)


def refuse_other_accumulation(saved: HalfStep, trainer: Trainer) -> None:
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
