"""The gradient of a step over micro-batches and ranks is that of their joined batch, whatever each of them holds."""

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from lightning_moevlm.losses import AuxiliaryLosses, OutputZ
from lightning_moevlm.models import Backbone
from lightning_moevlm.objectives import MaskedModelling
from lightning_moevlm.records import Batch, WholeStep
from lightning_moevlm.shards.steps_ahead import StepsAhead
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.step_size import StepSizes
from tests.losses.every_loss import LOSSES
from tests.small_model import small_limoe, small_vl_moe, uneven_batch
from tests.training.small_fit import fit

WHOLE = uneven_batch(10)
LOSS_OF_STEPS = {
    name: loss
    for name, loss in LOSSES.items()
    if (isinstance(loss, OutputZ) or loss.adds_up) and "global" not in name  # global: f so far
}


def rows(start: int, stop: int) -> Batch:
    return Batch(*(field[start:stop] for field in WHOLE[:4]))  # type: ignore[index]


def words_alone(batch: Batch) -> Batch:
    return batch._replace(images_BRYX=None)


def images_alone(batch: Batch) -> Batch:
    return batch._replace(text_BL=None, text_mask_BL=None)


PAIRS = (WHOLE, [rows(0, 1), rows(1, 4), rows(4, 10)])
"""A joined batch and its parts: texts of 1, of 2 to 4, and of all lengths."""

UNLIKE = (
    # rows: 3 pairs, 4 images alone, 3 texts alone
    Batch(
        WHOLE.images_BRYX[:7],  # type: ignore[index]
        torch.cat([WHOLE.text_BL[:3], WHOLE.text_BL[7:]]),  # type: ignore[index]
        torch.cat([WHOLE.text_mask_BL[:3], WHOLE.text_mask_BL[7:]]),  # type: ignore[index]
        WHOLE.keys,
        num_pairs=3,
    ),
    [rows(0, 3), images_alone(rows(3, 7)), words_alone(rows(7, 10))],
)
"""The same, of which no two parts hold the same modalities."""


def module_of(build: type[Backbone], losses: AuxiliaryLosses) -> VisionLanguageModule:
    backbone = build(top_k=2)  # type: ignore[call-arg]
    return VisionLanguageModule(backbone, losses=losses, optimizer=partial(SGD, lr=1.0), init_std=0.3)


def gradient(module: VisionLanguageModule, parts: Sequence[Batch]) -> dict[str, Tensor]:
    """The mean of the parts' gradients, as accumulation and data-parallel training take it."""
    module.zero_grad()
    module.num_parts_seen = len(parts)  # type: ignore[assignment]
    step = WholeStep(tuple(part.without_pixels() for part in parts))
    for part in parts:
        whole = StepSizes(module.objective).measure(part._replace(step=step), 0, len(parts), lambda own: own)
        _, report = module.losses_of(part, whole if len(parts) > 1 else None)
        (report.differentiated / len(parts)).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


class InParts(VisionLanguageModule):
    """Has no trainer that knows the number of parts."""

    num_parts_seen = 1

    @property
    def _num_parts(self) -> int:
        return self.num_parts_seen


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        size = float(value.norm())
        assert float((found[name] - value).norm()) <= 2e-5 * size + 1e-9, name


@pytest.mark.parametrize("build", [small_vl_moe, small_limoe])
@pytest.mark.parametrize("whole, parts", [PAIRS, UNLIKE], ids=["unequal texts", "unlike modalities"])
def test_terms_of_the_task_are_those_of_the_joined_batch(build: object, whole: Batch, parts: list[Batch]) -> None:
    module = InParts(build(top_k=2), losses=AuxiliaryLosses(None, None), init_std=0.3)  # type: ignore[operator]
    assert_same(gradient(module, parts), gradient(module, [whole]))


@pytest.mark.parametrize("build", [small_vl_moe, small_limoe])
@pytest.mark.parametrize("name", LOSS_OF_STEPS)
def test_losses_that_add_up_are_those_of_the_joined_batch(build: object, name: str) -> None:
    field = name.split(",")[0].split()[0]
    losses = AuxiliaryLosses(**{"load_balance": None, "router_z": None, field: LOSS_OF_STEPS[name]})
    module = InParts(build(top_k=2), losses=losses, init_std=0.3)  # type: ignore[operator]
    for whole, parts in (PAIRS, UNLIKE):
        assert_same(gradient(module, parts), gradient(module, [whole]))


def test_lightning_takes_the_step_of_the_joined_batch() -> None:
    losses = AuxiliaryLosses(load_balance=None)
    whole, parts = UNLIKE
    options = {"optimizer": partial(SGD, lr=0.1), "losses": losses, "init_std": 0.3}
    one, three = (VisionLanguageModule(small_vl_moe(), MaskedModelling, **options) for _ in range(2))  # type: ignore[arg-type]
    fit(one, 2, batches=[whole] * 2)
    fit(three, 2, batches=StepsAhead(parts * 2, 3), accumulate=3)  # type: ignore[arg-type]
    assert_same(dict(three.named_parameters()), dict(one.named_parameters()))
