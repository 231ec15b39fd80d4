"""Matching images with texts: negatives by similarity, the loss by hand, scores that no batch size moves."""

from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.model.objectives import Contrastive, Draws, Joint, MaskedModelling, Matching
from lightning_moevlm.model.objectives.matching import draw_negatives, matching_loss
from lightning_moevlm.training import VisionLanguageModule
from tests.small_model import cut, pair_batch, small_limoe, small_vl_moe, uneven_batch
from tests.training.test_evaluation import measured

SMALL = partial(Matching, num_evaluated=10)


def test_negatives_are_drawn_in_proportion_to_similarity() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 5.0], [9.0, 0.0, 0.0, 1.0]])
    allowed = torch.tensor([[True, True, True, False], [False, True, True, False]])
    uniform = torch.linspace(0, 1, 10_001)[:-1]
    for row, expected in enumerate(([0.0900, 0.2447, 0.6652, 0.0], [0.0, 0.5, 0.5, 0.0])):  # softmax by hand
        rows = [each[row].expand(len(uniform), 4) for each in (logits, allowed)]
        share = torch.bincount(draw_negatives(*rows, uniform), minlength=4) / len(uniform)
        assert share.tolist() == pytest.approx(expected, abs=2e-4)
    none = draw_negatives(logits, torch.zeros_like(allowed), torch.tensor([0.3, 0.999]))
    assert none.tolist() == [0, 0]
    sharp = draw_negatives(torch.tensor([[80.0, 0.0, -80.0]]), torch.tensor([[True] * 3]), torch.tensor([1 - 2**-24]))
    assert sharp.tolist() == [0]


def test_the_loss_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0], [-1.0, 5.0], [0.0, 5.0]])
    one = [torch.tensor(2.0).sigmoid().log(), torch.tensor(1.0).sigmoid().log(), torch.tensor(0.5).log()]
    expected = -(sum(one) / 3 + torch.tensor(0.5).log()) / 2  # the second pair has no negatives
    assert torch.allclose(matching_loss(logits, torch.tensor([True, False])), expected)


def seen(objective: Matching, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
    """The images and texts of the matching pass, (3, B, ...)."""
    passes: list[tuple[Tensor, Tensor]] = []
    backbone = small_limoe(is_sparse=False, num_blocks=1)
    forward = backbone.forward

    def record(images: Tensor, text: Tensor, mask: Tensor, separate: bool = False) -> object:
        passes.append((images, text))
        return forward(images, text, mask, separate=separate)

    backbone.forward = record  # type: ignore[method-assign, assignment]
    objective.train()(backbone, batch, draws)
    (images, texts) = passes[1]
    return images.unflatten(0, (3, -1)), texts.unflatten(0, (3, -1))


def test_a_negative_is_another_image_or_text() -> None:
    batch = pair_batch(6)
    assert batch.images_BRYX is not None and batch.text_BL is not None
    batch.images_BRYX[1] = batch.images_BRYX[0]  # an image with two captions, as in COCO
    batch.text_BL[3] = batch.text_BL[2]
    objective = Matching(small_limoe().spec)
    torch.nn.init.normal_(objective.contrast.image_projection.weight)
    torch.nn.init.normal_(objective.contrast.text_projection.weight)
    torch.nn.init.zeros_(objective.contrast.log_scale.value)
    drawn = set()
    for step in range(12):
        images, texts = seen(objective, batch, Draws(step))
        assert torch.equal(images[0], batch.images_BRYX) and torch.equal(texts[0], batch.text_BL)
        assert torch.equal(images[1], batch.images_BRYX) and torch.equal(texts[2], batch.text_BL)
        for row in range(6):
            text = next(j for j in range(6) if torch.equal(texts[1, row], batch.text_BL[j]))
            image = next(j for j in range(6) if torch.equal(images[2, row], batch.images_BRYX[j]))
            for negative in (text, image):
                assert not torch.equal(batch.images_BRYX[negative], batch.images_BRYX[row])
                assert not torch.equal(batch.text_BL[negative], batch.text_BL[row])
            drawn.add((row, text))
    assert len(drawn) > 15  # other negatives in other steps
    again = seen(objective, batch, Draws(11))
    assert torch.equal(again[0], images) and torch.equal(again[1], texts)


@pytest.mark.parametrize("build", [small_vl_moe, small_limoe])
def test_evaluation_does_not_depend_on_the_batch_size(build: type) -> None:
    module = VisionLanguageModule(build(), SMALL, init_std=0.3)
    whole = uneven_batch(25)
    expected = measured(module, [whole])
    wanted = {"val/matching_accuracy", "val/matching_auc", "val_loss/matching", "val/recall_at_1/image_to_text"}
    assert wanted <= set(expected) and expected["val/matching_majority"] == pytest.approx(2 / 3)
    assert expected["val/task_loss"] == pytest.approx(
        expected["val_loss/contrastive"] + expected["val_loss/matching"], rel=1e-5
    )
    assert measured(module, cut(whole, 4)) == pytest.approx(expected, rel=2e-5)


def test_scores_are_those_of_a_loop_over_decisions() -> None:
    module = VisionLanguageModule(small_limoe(), Matching, init_std=0.5).eval()
    batch = uneven_batch(9)
    found = measured(module, cut(batch, 4))
    objective = module.objective
    assert isinstance(objective, Matching)
    with torch.no_grad():
        compared = objective.contrast.compare(module.backbone, batch)
        embeddings = compared.output.embeddings
        assert embeddings is not None
        order = sorted(range(9), key=lambda row: embeddings.keys[row])
        order = sorted(order, key=lambda row: _hash(embeddings.keys[row]))
        rows = batch.select(order)
        again = objective.contrast.compare(module.backbone, rows).output.embeddings
        texts, images, has_negative = objective.negatives_of_set(again)  # type: ignore[arg-type]
        assert has_negative.all()
        matching, others = [], []
        for row in range(9):
            for image, text, into in (
                (row, row, matching),
                (row, int(texts[row]), others),
                (int(images[row]), row, others),
            ):
                pair = Batch(rows.images_BRYX[[image]], rows.text_BL[[text]], rows.text_mask_BL[[text]], ("k",))  # type: ignore[index]
                into.append(float(objective.head(module.backbone(*pair[:3]).read_text())))
    right = sum(logit > 0 for logit in matching) + sum(logit <= 0 for logit in others)
    assert found["val/matching_accuracy"] == pytest.approx(right / 27)
    above = sum((one > other) + 0.5 * (one == other) for one in matching for other in others)
    assert found["val/matching_auc"] == pytest.approx(above / (9 * 18), abs=1e-6)


def _hash(key: str) -> int:
    from hashlib import blake2b

    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big")


def test_one_batch_is_learnt() -> None:
    module = VisionLanguageModule(small_vl_moe(num_blocks=2, sparse_modalities=()), Matching)
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3)
    batch = pair_batch(4)
    for step in range(70):
        _, report = module.train().compute_losses(batch, step)
        optimizer.zero_grad()
        report.total_loss.backward()
        optimizer.step()
    assert float(report.task["matching"].raw) < 0.2  # 0.64 is the best constant
    assert measured(module, [batch])["val/matching_auc"] > 0.95


def test_it_is_a_part_of_a_joint_objective() -> None:
    parts = {"masked": MaskedModelling, "match": SMALL}
    module = VisionLanguageModule(small_limoe(), partial(Joint, parts=parts, weights={"match": 0.5}), init_std=0.3)
    _, report = module.train().compute_losses(uneven_batch(6), 0)
    assert {"match_contrastive", "match_matching", "masked_text"} <= report.task.keys()
    found = measured(module, [uneven_batch(12)])
    terms = [value for key, value in found.items() if key.startswith("val_loss/match_")]
    masked = [value for key, value in found.items() if key.startswith("val_loss/masked_")]
    assert found["val/task_loss"] == pytest.approx(0.5 * sum(terms) + sum(masked), rel=1e-5)
    with pytest.raises(UserError, match="each compute retrieval over the whole evaluation set: keep one"):
        Joint(small_limoe().spec, {"match": SMALL, "contrast": Contrastive})


def test_the_size_of_a_step_is_known_beforehand() -> None:
    module, batch = VisionLanguageModule(small_limoe(), Matching), pair_batch(5)  # texts of one length
    size = module.objective.size(batch.without_pixels())
    assert size is not None
    output = module.objective.train()(module.backbone, batch, Draws(0))
    assert {name: term.num_predictions for name, term in output.terms.items()} == {
        name: int(number) for name, number in size.predictions.items()
    }
    for source, one in size.passes.items():
        plans = [named.plan for named in output.plans if named.source == source]
        assert plans and all(int(plan.valid_T.sum()) == int(one.tokens_A.sum()) for plan in plans)
        assert int(one.sequences) == (5 if source.startswith("contrastive") else 15)


def test_what_it_lacks_is_told() -> None:
    images = pair_batch(3)._replace(text_BL=None, text_mask_BL=None, num_pairs=0)
    with pytest.raises(UserError, match="Matching needs images with their texts"):
        Matching(small_limoe().spec)(small_limoe(), images, Draws(0))
    with pytest.raises(UserError, match="num_evaluated of Matching"):
        Matching(small_limoe().spec, num_evaluated=1)
    alone = Matching(small_limoe().spec).train()(small_limoe(), pair_batch(1), Draws(0))  # without any negative
    assert alone.terms["matching"].raw.isfinite()
