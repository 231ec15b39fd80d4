"""Trains on ranks; `torchrun --nproc_per_node 2 -m tests.model.backbones.adopted.adopted_ranks FILE` saves rank 0's."""

import os
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.model.losses import AuxiliaryLosses, LoadBalance, RouterZ
from lightning_moevlm.model.objectives import NextToken
from lightning_moevlm.training import VisionLanguageModule
from tests.model.backbones.adopted.small_hugging_face import DEEPSEEK, QWEN, small_hugging_face
from tests.small_model import uneven_batch
from tests.training.small_fit import fit

LOSSES = AuxiliaryLosses(LoadBalance(0.5, scope="global"), RouterZ(0.1))


def rows(batch: Batch, start: int, stop: int) -> Batch:
    """Some samples of a batch of pairs."""
    return Batch(*(field[start:stop] for field in batch[:4]))


def trained(rank: int, ranks: int, steps: int, losses: AuxiliaryLosses, **options: Any) -> VisionLanguageModule:
    """Train on this rank's part of pairs with texts of 1 to 5 words: 3 of them for the first rank of two."""
    whole = uneven_batch(8)
    mine = whole if ranks == 1 else rows(whole, 3 * rank, 3 + 5 * rank)
    if "bias_rate" in options:  # of a language model
        mine = mine._replace(images_BRYX=None)
    module = VisionLanguageModule(
        small_hugging_face(**options), NextToken, losses, optimizer=partial(SGD, lr=1.0), trainable=None
    )
    strategy = "ddp_find_unused_parameters_true" if ranks > 1 else "auto"
    fit(module, steps, batches=[mine] * steps, ranks=ranks, strategy=strategy)
    return module


def results(rank: int, ranks: int) -> Mapping[str, Mapping[str, Tensor]]:
    """Return what one step of plain SGD makes of the weights, and where it moves balancing biases."""
    nothing = AuxiliaryLosses(None, None)
    weights = {
        name: trained(rank, ranks, 1, LOSSES, **options).state_dict()
        for name, options in {
            "whole": {"config": QWEN},
            "checkpointed": {"config": QWEN, "gradient_checkpointing": True},
            "routers": {"config": QWEN, "frozen": ("all_but_routers",)},
        }.items()
    }
    biased = trained(rank, ranks, 1, nothing, config=DEEPSEEK, bias_rate=0.1)
    return weights | {"bias": {name: value for name, value in biased.state_dict().items() if name.endswith("_bias")}}


if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    found = results(rank, int(os.environ["WORLD_SIZE"]))
    if rank == 0:
        torch.save({case: dict(values) for case, values in found.items()}, sys.argv[1])
