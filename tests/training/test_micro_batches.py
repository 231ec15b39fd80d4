"""The gradient of a step over micro-batches and ranks is that of their joined batch, for any content."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.optim import SGD

from lightning_moevlm.contracts.batch import Batch, WholeStep
from lightning_moevlm.data.load.steps_ahead import StepsAhead
from lightning_moevlm.model.backbones import BackboneSpec
from lightning_moevlm.model.losses import AuxiliaryLosses, OutputZ, RouterZ, SequenceBalance
from lightning_moevlm.model.losses.regularising import expert_coupling
from lightning_moevlm.model.objectives import Joint, MaskedModelling, NextToken, Objective
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.callbacks import Telemetry
from lightning_moevlm.training.step.step_size import StepSizeMeter
from tests.model.losses.every_loss import LOSSES
from tests.small_model import small_decoder, small_limoe, small_moma, small_vl_moe, uneven_batch
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


MASKED_AND_CAPTION = partial(Joint, parts={"masked": MaskedModelling, "caption": NextToken}, weights={"masked": 0.5})

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


def gradient(module: "InParts", parts: Sequence[Batch]) -> dict[str, Tensor]:
    """The mean of the parts' gradients, as accumulation and data-parallel training take it."""
    module.zero_grad()
    module.num_parts_seen = len(parts)
    step = WholeStep(tuple(part.without_pixels() for part in parts))
    for part in parts:
        whole = StepSizeMeter(module.objective).measure(part._replace(step=step), 0, len(parts), lambda own: own)
        _, report = module.compute_losses(part, 0, whole if len(parts) > 1 else None)
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


@pytest.mark.parametrize("build", [small_vl_moe, small_limoe, small_moma])
@pytest.mark.parametrize("objective", [MaskedModelling, MASKED_AND_CAPTION], ids=["masked", "joint"])
@pytest.mark.parametrize("whole, parts", [PAIRS, UNLIKE], ids=["unequal texts", "unlike modalities"])
def test_terms_of_the_task_are_those_of_the_joined_batch(
    build: object, objective: Callable[[BackboneSpec], Objective], whole: Batch, parts: list[Batch]
) -> None:
    module = InParts(build(top_k=2), objective, AuxiliaryLosses(None, None), init_std=0.3)  # type: ignore[operator]
    assert_same(gradient(module, parts), gradient(module, [whole]))


def test_losses_on_routing_are_means_over_the_passes_of_all_objectives() -> None:
    losses = AuxiliaryLosses(load_balance=None, router_z=RouterZ(), sequence_balance=SequenceBalance())
    module = InParts(small_vl_moe(top_k=2), MASKED_AND_CAPTION, losses, init_std=0.3)
    for whole, parts in (PAIRS, UNLIKE):
        assert_same(gradient(module, parts), gradient(module, [whole]))


@pytest.mark.parametrize("build", [small_vl_moe, small_limoe])
@pytest.mark.parametrize("name", LOSS_OF_STEPS)
def test_losses_that_add_up_are_those_of_the_joined_batch(
    build: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_coupling, "draw_noise", torch.ones_like)  # each micro-batch draws noise of its own
    field = name.split(",")[0].split()[0]
    losses = AuxiliaryLosses(**{"load_balance": None, "router_z": None, field: LOSS_OF_STEPS[name]})
    module = InParts(build(top_k=2), losses=losses, init_std=0.3)  # type: ignore[operator]
    for whole, parts in (PAIRS, UNLIKE):
        assert_same(gradient(module, parts), gradient(module, [whole]))


def test_a_decoder_takes_the_step_of_the_joined_batch() -> None:
    losses = AuxiliaryLosses(load_balance=None, router_z=RouterZ(), sequence_balance=SequenceBalance())
    module = InParts(small_decoder(top_k=2), NextToken, losses, init_std=0.3)
    for whole, parts in (PAIRS, UNLIKE):
        usable = [part for part in parts if module.objective.can_use(part)]
        assert_same(gradient(module, usable), gradient(module, [whole]))


def test_lightning_takes_the_step_of_the_joined_batch() -> None:
    losses = AuxiliaryLosses(load_balance=None)
    whole, parts = UNLIKE
    options = {"optimizer": partial(SGD, lr=0.1), "losses": losses, "init_std": 0.3}
    one, three = (VisionLanguageModule(small_vl_moe(), MaskedModelling, **options) for _ in range(2))  # type: ignore[arg-type]
    expected = fit(one, 2, batches=[whole] * 2, callbacks=[Telemetry()]).points
    found = fit(three, 2, batches=StepsAhead(parts * 2, 3), accumulate=3, callbacks=[Telemetry()]).points
    assert_same(dict(three.named_parameters()), dict(one.named_parameters()))
    for key in ("train/task_loss", "train/total_loss", "loss/text", "loss/image", "loss/router_z", "grad_norm"):
        assert [value for _, value in found[key]] == pytest.approx([value for _, value in expected[key]], rel=1e-5), key


def test_a_step_resumed_in_its_midst_is_the_step_of_the_joined_batch(tmp_path: Path) -> None:
    whole, parts = PAIRS
    options = {"optimizer": partial(SGD, lr=0.1), "losses": AuxiliaryLosses(load_balance=None), "init_std": 0.3}
    one, three, again = (VisionLanguageModule(small_vl_moe(), **options) for _ in range(3))  # type: ignore[arg-type]
    fit(one, 1, batches=[whole])
    fit(three, 1, batches=StepsAhead(parts, 3), accumulate=3, callbacks=[SaveAmid(tmp_path / "amid.ckpt")])
    rest = [part._replace(step=WholeStep(tuple(parts[1:]))) for part in parts[1:]]  # as a resumed loader knows it
    # a plain list knows no position: the epoch keeps its length, and begins with what is left
    fit(again, 1, batches=[*rest, whole], accumulate=3, resume_from=tmp_path / "amid.ckpt")
    for module in (three, again):
        assert_same(dict(module.named_parameters()), dict(one.named_parameters()))


class SaveAmid(Checkpoint):
    """Saves after the first micro-batch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if not self.path.exists():
            trainer.save_checkpoint(self.path)


def test_a_loader_that_does_not_look_ahead_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(VisionLanguageModule(small_vl_moe()), 2, batches=[rows(0, 5), rows(5, 10)] * 2, accumulate=2)
    assert (
        sum("This loader does not look ahead over the optimiser step" in record.message for record in caplog.records)
        == 1
    )
