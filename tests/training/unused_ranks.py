"""Trains without reaching every parameter; `torchrun --nproc_per_node 2 -m tests.training.unused_ranks FILE`."""

import os
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.model.backbones import Backbone, BackboneSpec
from lightning_moevlm.model.losses import AuxiliaryLosses
from lightning_moevlm.model.objectives import (
    Contrastive,
    Joint,
    MaskedModelling,
    Matching,
    NextToken,
    Objective,
    VisualReasoning,
)
from lightning_moevlm.model.objectives.masked_modelling import TermWeights
from lightning_moevlm.training import VisionLanguageModule
from tests.model.objectives.two_images import statement_batch
from tests.small_model import pair_batch, small_limoe, small_moma, small_vl_moe
from tests.training.small_fit import fit

PAIRS = pair_batch(8)
IMAGES = PAIRS._replace(text_BL=None, text_mask_BL=None, num_pairs=0)
TEXTS = PAIRS._replace(images_BRYX=None, num_pairs=0)
BOTH_ALONE = PAIRS._replace(num_pairs=0, keys=tuple(f"alone{index}" for index in range(16)))
FAMILIES: dict[str, Callable[[], Backbone]] = {"LIMoE": small_limoe, "MoMa": small_moma}  # others are VLMoE
CASES: dict[str, tuple[list[Batch], Callable[[BackboneSpec], Objective]]] = {
    "texts alone": ([TEXTS] * 3, MaskedModelling),
    "images alone": ([IMAGES] * 3, MaskedModelling),
    "a term without a weight": ([PAIRS] * 3, partial(MaskedModelling, weights=TermWeights(text=None))),
    "batches of one modality among pairs": ([PAIRS, IMAGES, TEXTS], MaskedModelling),
    "a modality for each rank": ([BOTH_ALONE] * 3, MaskedModelling),
    "next tokens of pairs and texts": ([PAIRS, TEXTS, PAIRS], NextToken),
    "contrast and masks of mixed batches": (
        [PAIRS, IMAGES, PAIRS],
        partial(Joint, parts={"contrast": Contrastive, "masked": MaskedModelling}, weights={"masked": 0.5}),
    ),
    "contrast by softmax": ([PAIRS] * 3, Contrastive),
    "contrast by sigmoid": ([PAIRS] * 3, partial(Contrastive, kind="sigmoid")),
    "statements about two images": ([statement_batch(8)] * 3, VisualReasoning),
    "matching": ([PAIRS] * 3, Matching),
    "LIMoE: texts alone": ([TEXTS] * 3, MaskedModelling),
    "MoMa: next tokens of pairs and texts": ([PAIRS, TEXTS, PAIRS], NextToken),
}
OF_ONE_RANK = ("matching",)
"""Cases whose ranks do not add up to one process: negatives are those of a rank."""


def joined(case: str) -> list[Batch]:
    """Return the joint training data of all ranks."""
    return [PAIRS] * 3 if case == "pairs" else CASES[case][0]


def trained(case: str, batches: list[Batch], *, steps: int = 3, **options: object) -> dict[str, Tensor]:
    """Return the weights after so many steps of plain SGD."""
    objective = CASES[case][1] if case in CASES else MaskedModelling
    module = VisionLanguageModule(
        FAMILIES.get(case.partition(":")[0], small_vl_moe)(),
        objective,
        AuxiliaryLosses(None, None),  # the balance loss of a batch is not the mean of those of its parts
        optimizer=partial(torch.optim.SGD, lr=0.1),
        init_std=0.1,
    )
    if steps:
        fit(module, steps, batches=batches, use_distributed_sampler=False, **options)  # type: ignore[arg-type]
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def part_of(batch: Batch, rank: int) -> Batch:
    """Return the samples of one of two ranks: a half, or of images and texts that come alone one of the two."""
    if batch is BOTH_ALONE:
        of_rank = batch.keys[8 * rank : 8 * rank + 8]
        gone = {"images_BRYX": None} if rank else {"text_BL": None, "text_mask_BL": None}
        return batch._replace(keys=of_rank, **gone)  # type: ignore[arg-type]
    part = slice(4 * rank, 4 * rank + 4)
    answers = None if batch.answers is None else batch.answers.select(range(part.start, part.stop))
    batch = batch._replace(answers=answers)
    return batch._replace(
        **{name: value[part] for name, value in batch._asdict().items() if isinstance(value, Tensor) or name == "keys"}
    )


def main(target: str) -> None:

    rank = int(os.environ["RANK"])
    found = {
        case: trained(case, [part_of(batch, rank) for batch in joined(case)], ranks=2, strategy="ddp") for case in CASES
    }
    if rank == 0:
        torch.save(found, target)


if __name__ == "__main__":
    main(sys.argv[1])
