"""True or false of two images: scores that no batch size moves, both images and their order, the blind model."""

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Answers, Batch
from lightning_moevlm.model.objectives import Draws, VisualReasoning
from lightning_moevlm.training import VisionLanguageModule
from tests.model.objectives.two_images import cut_statements, statement_batch
from tests.small_model import small_limoe, small_vl_moe, uneven_batch
from tests.training.test_evaluation import measured


@pytest.mark.parametrize("build", [small_vl_moe, small_limoe])
def test_evaluation_does_not_depend_on_the_batch_size(build: type) -> None:
    module = VisionLanguageModule(build(), VisualReasoning, init_std=0.3)
    whole = statement_batch(25)
    expected = measured(module, [whole])
    assert {"val/statement_accuracy/all", "val/statement_majority/more", "val_loss/statement"} <= set(expected)
    assert expected["val/statement_majority/all"] == pytest.approx((8 + 6) / 25)  # of 13 both and 12 more
    assert measured(module, cut_statements(whole, 4)) == pytest.approx(expected, rel=2e-5)


def test_each_image_and_their_order_matter() -> None:
    backbone, batch = small_limoe().eval(), statement_batch(6)
    objective = VisualReasoning(backbone.spec).eval()
    torch.nn.init.normal_(objective.out.weight)
    left, right = batch.images_BRYX, batch.second_images_BRYX
    assert left is not None and right is not None
    others = (
        batch,
        batch._replace(images_BRYX=255 - left),
        batch._replace(second_images_BRYX=255 - right),
        batch._replace(images_BRYX=right, second_images_BRYX=left),
    )
    losses = {float(objective(backbone, each, Draws(0)).terms["statement"].raw) for each in others}
    assert len(losses) == len(others)
    blind = VisualReasoning(backbone.spec, sees_images=False).eval()
    blind.load_state_dict(objective.state_dict())
    assert len({float(blind(backbone, each, Draws(0)).terms["statement"].raw) for each in others}) == 1


def test_one_batch_is_learnt_by_what_tells_its_images_apart() -> None:
    """Each text comes twice, true and false, so only the images can decide."""
    module = VisionLanguageModule(small_vl_moe(), VisualReasoning)
    batch = statement_batch(8)
    assert batch.text_BL is not None and batch.text_mask_BL is not None
    rows = torch.arange(8) // 2
    batch = batch._replace(
        text_BL=batch.text_BL[rows],
        text_mask_BL=batch.text_mask_BL[rows],
        answers=Answers((("true",), ("false",)) * 4, ("both",) * 8),
    )
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for step in range(80):
        _, report = module.train().compute_losses(batch, step)
        optimizer.zero_grad()
        report.total_loss.backward()
        optimizer.step()
    judged = module.objective.eval()(module.backbone.eval(), batch, Draws(0)).judged
    assert judged.said == judged.truth == (True, False) * 4
    assert len(set(judged.text_ids)) == 4


def test_the_size_of_a_step_is_known_beforehand() -> None:
    module = VisionLanguageModule(small_limoe(), VisualReasoning)
    batch = statement_batch(5)
    size = module.objective.size(batch.without_pixels())
    output = module.objective(module.backbone, batch, Draws(0))
    assert size.predictions["statement"] == output.terms["statement"].num_predictions == 5
    assert size.passes["pair"].sequences == 10
    assert size.passes["pair"].tokens_A.sum() == output.plans[-1].plan.valid_T.sum()


def test_what_it_lacks_is_told() -> None:
    objective = VisualReasoning(small_vl_moe().spec)
    lacking: list[Batch] = [uneven_batch(3), statement_batch(3)._replace(second_images_BRYX=None)]
    for batch in lacking:
        assert not objective.can_use(batch)
        with pytest.raises(UserError, match=r"convert statements` or `nlvr2`, and set data\.second_image to right"):
            objective(small_vl_moe(), batch, Draws(0))
    odd = statement_batch(2)._replace(answers=Answers((("true",), ("maybe",)), ("", "")))
    with pytest.raises(UserError, match=r"has the answers \['maybe'\], and a statement has one, true or false"):
        objective(small_vl_moe(), odd, Draws(0))
