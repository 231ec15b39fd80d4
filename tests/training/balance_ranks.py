"""Trains on ranks; `torchrun --nproc_per_node 2 -m tests.training.balance_ranks FILE` saves the results of rank 0."""

import sys
from collections.abc import Mapping
from functools import partial

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.data.load.steps_ahead import StepsAhead
from lightning_moevlm.model.dispatch import Capacity
from lightning_moevlm.model.losses import (
    AuxiliaryLosses,
    ByOverflow,
    GlobalEntropy,
    GShard,
    Importance,
    LoadBalance,
    LocalEntropy,
    MutualInformation,
    ReLUL1,
    RouterOrthogonality,
    RouterZ,
    SequenceBalance,
)
from lightning_moevlm.model.objectives import Matching
from lightning_moevlm.model.routers import SMEBU, QuantileUpdate, ReLURouter, SigmoidBiasRouter
from lightning_moevlm.training import VisionLanguageModule
from tests.small_model import pair_batch, small_limoe, uneven_batch
from tests.training.small_fit import NoTask, build, fit, routers

SUMS = AuxiliaryLosses(
    LoadBalance(0.5, scope="global", per_modality=True),
    RouterZ(0.1),
    sequence_balance=SequenceBalance(0.5),
    local_entropy=LocalEntropy(0.5),
)
"""Losses that add up over equal shards: two ranks with a half each are one with the whole."""

EVALUATED = AuxiliaryLosses(
    LoadBalance(0.5, per_modality=True),
    RouterZ(0.1),
    importance=Importance(0.5),
    gshard=GShard(0.5),
    global_entropy=GlobalEntropy(0.5),
    mutual_information=MutualInformation(0.5),
)
"""Measured once on the sums of all ranks, whether or not they add up."""

OTHERS = AuxiliaryLosses(
    LoadBalance(0.5),
    importance=Importance(0.5),
    gshard=GShard(0.5),
    global_entropy=GlobalEntropy(0.5),
    mutual_information=MutualInformation(0.5),
    router_orthogonality=RouterOrthogonality(0.5),
)
"""Losses of the shard at hand: two ranks with the same shard are one with that shard."""


def rows(batch: Batch, start: int, stop: int) -> Batch:
    """Some samples of a batch of pairs."""
    return Batch(*(field[start:stop] for field in batch[:4]))


def evaluated(module: VisionLanguageModule, rank: int, ranks: int) -> Mapping[str, Tensor]:
    """Validate on pairs, which the first of two ranks has, and on images alone, which the second has."""
    whole = uneven_batch(10)
    images = rows(whole, 5, 10)._replace(text_BL=None, text_mask_BL=None)
    of_ranks = [[rows(whole, 0, 2), rows(whole, 2, 5)], [images]]
    batches = of_ranks[rank] if ranks > 1 else of_ranks[0] + of_ranks[1]
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp_find_unused_parameters_true" if ranks > 1 else "auto",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.validate(module, StepsAhead(batches, 1), verbose=False)
    return {key: value.float().cpu() for key, value in trainer.callback_metrics.items()}


def results(rank: int, ranks: int) -> Mapping[str, Mapping[str, Tensor]]:
    """Train and validate small models on this rank's part and return the results."""
    mine = [rows(pair_batch(8), rank * 8 // ranks, (rank + 1) * 8 // ranks)] * 2
    # texts of 1 to 3 words for the first rank of two, of all lengths for the second
    uneven = [uneven_batch(8) if ranks == 1 else rows(uneven_batch(8), 3 * rank, 3 + 5 * rank)] * 2
    same = [pair_batch(4)] * 2

    def trained(module: VisionLanguageModule, batches: list[Batch]) -> VisionLanguageModule:
        fit(
            module, 2, batches=batches, ranks=ranks, strategy="ddp_find_unused_parameters_true" if ranks > 1 else "auto"
        )
        return module

    small = partial(build, lr=1.0, objective=NoTask)
    relu = small(AuxiliaryLosses(None, None, relu_l1=ReLUL1()), ReLURouter)
    overflow = small(
        AuxiliaryLosses(LoadBalance(ByOverflow(0.2))), capacity=Capacity(1.0, 1.0), lr=1.0, objective=NoTask
    )
    bias, smebu, quantiles = (
        small(AuxiliaryLosses(None), partial(SigmoidBiasRouter, update_rate=0.1, update=rule))
        for rule in ("sign", SMEBU(), QuantileUpdate())
    )
    return {
        "sums": routers(trained(small(SUMS), mine)),
        "text": routers(trained(small(AuxiliaryLosses(LoadBalance(0.5, scope="global", only="text"), None)), mine)),
        "uneven": dict(trained(build(SUMS, lr=0.1), uneven).named_parameters()),
        "evaluation": evaluated(build(EVALUATED), rank, ranks),
        "matching": evaluated(VisionLanguageModule(small_limoe(), partial(Matching, num_evaluated=4)), rank, ranks),
        "others": routers(trained(small(OTHERS), same)),
        "relu": trained(relu, mine)._loss_weights.state_dict(),
        "overflow": trained(overflow, same)._loss_weights.state_dict(),
        "bias": {name: value for name, value in routers(trained(bias, mine)).items() if "bias" in name},
        "smebu": {name: value for name, value in routers(trained(smebu, mine)).items() if "bias" in name},
        "quantiles": {name: value for name, value in routers(trained(quantiles, mine)).items() if "bias" in name},
    }


if __name__ == "__main__":
    import os

    rank = int(os.environ["RANK"])
    found = results(rank, int(os.environ["WORLD_SIZE"]))
    if rank == 0:
        torch.save(found, sys.argv[1])
