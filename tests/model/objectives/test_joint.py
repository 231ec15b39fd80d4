"""Several objectives at once: the sum of the parts, and no more."""

from functools import partial

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.objectives import Contrastive, Draws, Joint, MaskedModelling, NextToken
from lightning_moevlm.model.routers import ExpertChoiceRouter
from lightning_moevlm.training import VisionLanguageModule
from tests.small_model import cut, pair_batch, small_limoe, small_vl_moe, uneven_batch
from tests.training.test_evaluation import measured

PARTS = {"contrast": Contrastive, "masked": MaskedModelling, "caption": NextToken}


def test_it_is_the_weighted_sum_of_its_parts() -> None:
    backbone, batch = small_vl_moe(), pair_batch(6)
    joint = Joint(backbone.spec, PARTS, {"masked": 0.25})
    output = joint(backbone, batch, Draws(3))
    expected = torch.zeros(())
    num_plans = 0
    for name, part in joint.parts.items():
        alone = part(backbone, batch, Draws(3))
        num_plans += len(alone.plans)
        expected = expected + sum(term.weighted for term in alone.terms.values()) * joint.weights[name]
        for term, value in alone.terms.items():
            assert torch.equal(output.terms[f"{name}_{term}"].raw, value.raw)
    assert float(sum(term.weighted for term in output.terms.values())) == pytest.approx(float(expected), rel=1e-6)
    assert len(output.plans) == num_plans and output.predictions.keys() <= joint.num_classes.keys()


def test_a_part_skips_what_it_cannot_use() -> None:
    joint = Joint(small_vl_moe().spec, PARTS)
    images = pair_batch(3)._replace(text_BL=None, text_mask_BL=None, num_pairs=0)
    output = joint(small_vl_moe(), images, Draws(0))
    assert set(output.terms) == {"masked_image"}
    only = Joint(small_vl_moe().spec, {"contrast": Contrastive})
    with pytest.raises(UserError, match="no part of Joint"):
        only(small_vl_moe(), images, Draws(0))


def test_sizes_are_those_of_the_parts() -> None:
    joint = Joint(small_vl_moe().spec, PARTS)
    batch = uneven_batch(6)
    size = joint.size(batch)
    assert size is not None and set(size.passes) >= {"contrast/pair", "masked/pair", "masked/text", "caption/pair"}
    terms = joint(small_vl_moe(), batch, Draws(0)).terms
    assert {term: value.num_predictions for term, value in terms.items()} == {
        term: int(number) for term, number in size.predictions.items() if int(number)
    }


def test_a_part_trains_on_its_own_sources() -> None:
    backbone, batch = small_vl_moe(), pair_batch(6)._replace(sources=("a", "b", "a", "b", "b", "c"))
    joint = Joint(backbone.spec, PARTS, sources={"contrast": ["a"], "caption": ["b", "c"]})
    output = joint(backbone, batch, Draws(3))
    size = joint.size(batch)
    assert size is not None
    for name, rows in {"contrast": [0, 2], "caption": [1, 3, 4, 5], "masked": [0, 1, 2, 3, 4, 5]}.items():
        alone = joint.get_submodule(f"parts.{name}")(backbone, batch.select(rows), Draws(3))
        for term, value in alone.terms.items():
            assert torch.equal(output.terms[f"{name}_{term}"].raw, value.raw)
            assert int(size.predictions[f"{name}_{term}"]) == value.num_predictions
        assert joint.samples_of(joint.get_submodule(f"parts.{name}"), batch).keys == batch.select(rows).keys
    of_b = batch.of_sources(("b",))
    assert not any(term.startswith("contrast") for term in joint(backbone, of_b, Draws(3)).terms)
    lacking = joint.size(of_b)
    assert lacking is not None and int(lacking.predictions["contrast_contrastive"]) == 0


def test_sources_that_the_data_lack_are_refused() -> None:
    joint = Joint(small_vl_moe().spec, PARTS, sources={"contrast": ["scenes"]})
    joint.check_sources(("scenes", "other"))
    with pytest.raises(UserError, match=r"gives contrast scenes, and data\.sources has other: name one of these"):
        joint.check_sources(("other",))
    with pytest.raises(UserError, match="gives masked no source"):
        Joint(small_vl_moe().spec, PARTS, sources={"masked": []}).check_sources(("scenes",))
    with pytest.raises(UserError, match="sources of Joint has two, which is not a part"):
        Joint(small_vl_moe().spec, PARTS, sources={"two": ["scenes"]})


def test_evaluation_does_not_depend_on_the_batch_size() -> None:
    module = VisionLanguageModule(small_limoe(), partial(Joint, parts=PARTS, weights={"contrast": 2.0}), init_std=0.3)
    whole = uneven_batch(25)
    expected = measured(module, [whole])
    assert {
        "val_loss/contrast_contrastive",
        "val/recall_at_1/image_to_text",
        "val/accuracy_masked_text",
        "val/perplexity/caption_caption",
    } <= set(expected)
    weighted = sum(
        expected[f"val_loss/{term}"] * (2.0 if term.startswith("contrast") else 1.0)
        for term in (key.removeprefix("val_loss/") for key in expected if key.startswith("val_loss/"))
        if term.startswith(("contrast", "masked", "caption"))
    )
    assert expected["val/task_loss"] == pytest.approx(weighted, rel=1e-5)
    assert measured(module, cut(whole, 4)) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(
    ("parts", "weights", "match"),
    [
        ({}, None, "has no parts"),
        ({"Big": MaskedModelling}, None, "lower-case letters"),
        (
            {"one": MaskedModelling},
            {"two": 1.0},
            "weights of Joint has two, which is not a part: remove it, or name one of one",
        ),
        (
            {"one": Contrastive, "two": Contrastive},
            None,
            "parts one, two of Joint each compute retrieval over the whole evaluation set: keep one",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(parts: dict, weights: dict | None, match: str) -> None:
    with pytest.raises(UserError, match=match):
        Joint(small_limoe().spec, parts, weights)


def test_a_part_may_refuse_the_backbone() -> None:
    with pytest.raises(UserError, match="a causal model cannot use"):
        VisionLanguageModule(small_limoe(router=ExpertChoiceRouter), partial(Joint, parts={"caption": NextToken}))
