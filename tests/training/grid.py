"""Every family with every objective, at sizes of milliseconds.

`torchrun --nproc_per_node 2 -m tests.training.grid FILE` trains them on two ranks and saves the weights.

A new family is a line of FAMILIES, a new objective one of OBJECTIVES with the batches that it can use.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.contracts.answer_list import AnswerList, write_answers
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.model.backbones import Backbone, BackboneSpec
from lightning_moevlm.model.losses import AuxiliaryLosses
from lightning_moevlm.model.objectives import (
    AnswerClassification,
    Classification,
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
from tests.small_model import small_decoder, small_limoe, small_moma, small_vl_moe
from tests.training.small_fit import fit

FAMILIES: dict[str, Callable[[], Backbone]] = {
    "VLMoE": small_vl_moe,
    "LIMoE": small_limoe,
    "MoMa": small_moma,
    "MoEDecoder": small_decoder,
}

PAIRS = statement_batch(8)._replace(num_pairs=8)
"""Pairs with a second image and the answer true or false, so that every objective can use them."""
_ALONE = PAIRS._replace(answers=None, second_images_BRYX=None)
IMAGES = _ALONE._replace(text_BL=None, text_mask_BL=None, num_pairs=0)
TEXTS = _ALONE._replace(images_BRYX=None, num_pairs=0)
BOTH_ALONE = _ALONE._replace(num_pairs=0, keys=tuple(f"alone{index}" for index in range(16)))


@cache
def truths() -> str:
    """Return a file with the answers of the pairs."""
    file = Path(tempfile.mkdtemp()) / "answers.json"
    write_answers(AnswerList(("true", "false"), (5, 3), "digest"), file)
    return str(file)


class Trained(NamedTuple):
    """An objective, the batches of its steps, and the most that is left of each loss once four pairs are learnt."""

    objective: Callable[[BackboneSpec], Objective]
    batches: list[Batch]
    left: dict[str, float]
    adds_up: bool = True  # whether ranks train as one process does on the joined batch


OBJECTIVES: dict[str, Trained] = {
    "MaskedModelling": Trained(
        MaskedModelling,
        [PAIRS, IMAGES, TEXTS],
        {"text": 0.05, "pair_text": 0.05, "image": 0.5, "pair_image": 0.5},
    ),
    "Contrastive": Trained(Contrastive, [PAIRS] * 3, {"contrastive": 0.05}),
    "Contrastive by sigmoid": Trained(partial(Contrastive, kind="sigmoid"), [PAIRS] * 3, {"contrastive": 0.1}),
    "NextToken": Trained(NextToken, [PAIRS, TEXTS, PAIRS], {"caption": 0.05}),
    "AnswerClassification": Trained(lambda spec: AnswerClassification(spec, truths()), [PAIRS] * 3, {"answer": 0.1}),
    "Classification": Trained(lambda spec: Classification(spec, truths()), [PAIRS] * 3, {"class": 0.1}),
    # negatives are those of a rank
    "Matching": Trained(Matching, [PAIRS] * 3, {"contrastive": 0.1, "matching": 0.3}, adds_up=False),
    "VisualReasoning": Trained(VisualReasoning, [PAIRS] * 3, {"statement": 0.1}),
    "Joint": Trained(
        partial(Joint, parts={"contrast": Contrastive, "caption": NextToken}, weights={"caption": 0.5}),
        [PAIRS, TEXTS, PAIRS],
        {"contrast_contrastive": 0.1, "caption_caption": 0.1},
    ),
}

REFUSED = {("MoEDecoder", "MaskedModelling"): r"cannot train a causal MoEDecoder.*choose the objective NextToken"}
"""Combinations that make no sense, by what is said of them."""

GRID = [pair for pair in product(FAMILIES, OBJECTIVES) if pair not in REFUSED]


class Case(NamedTuple):
    """What is trained on several ranks."""

    family: str
    objective: Callable[[BackboneSpec], Objective]
    batches: list[Batch]
    adds_up: bool = True


def _cases() -> Iterator[tuple[str, Case]]:
    for family, name in GRID:
        objective, batches, _, adds_up = OBJECTIVES[name]
        yield f"{family}, {name}", Case(family, objective, batches, adds_up)
    for family in FAMILIES:
        objective = NextToken if (family, "MaskedModelling") in REFUSED else MaskedModelling
        yield f"{family}, texts alone", Case(family, objective, [TEXTS] * 3)
    yield "images alone", Case("VLMoE", MaskedModelling, [IMAGES] * 3)
    without = partial(MaskedModelling, weights=TermWeights(text=None))
    yield "a term without a weight", Case("VLMoE", without, [PAIRS] * 3)
    yield "a modality for each rank", Case("VLMoE", MaskedModelling, [BOTH_ALONE] * 3)
    both = partial(Joint, parts={"contrast": Contrastive, "masked": MaskedModelling}, weights={"masked": 0.5})
    yield "contrast and masks of mixed batches", Case("VLMoE", both, [PAIRS, IMAGES, PAIRS])


CASES = dict(_cases())


def build(family: str, objective: Callable[[BackboneSpec], Objective], **options: object) -> VisionLanguageModule:
    """Return a small module without auxiliary losses: the balance of a batch is not the mean of that of its parts."""
    return VisionLanguageModule(
        FAMILIES[family](),
        objective,
        AuxiliaryLosses(None, None),
        init_std=0.1,
        **options,  # type: ignore[arg-type]
    )


def weights_after(case: Case, batches: list[Batch], steps: int, **options: object) -> dict[str, Tensor]:
    """Return the weights after so many steps of plain SGD."""
    module = build(case.family, case.objective, optimizer=partial(torch.optim.SGD, lr=0.1))
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
    return batch._replace(
        **{name: value[part] for name, value in batch._asdict().items() if isinstance(value, Tensor) or name == "keys"},
        num_pairs=4 if batch.pairs else 0,
        answers=None if batch.answers is None else batch.answers.select(range(part.start, part.stop)),
    )


def main(target: str) -> None:
    rank = int(os.environ["RANK"])
    found = {
        name: weights_after(case, [part_of(batch, rank) for batch in case.batches], 3, ranks=2, strategy="ddp")
        for name, case in CASES.items()
    }
    if rank == 0:
        torch.save(found, target)


if __name__ == "__main__":
    main(sys.argv[1])
