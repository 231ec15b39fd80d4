"""Answers chosen from a list: targets by hand, the blind model, and scores that no batch size moves."""

from functools import partial
from pathlib import Path

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.answer_list import AnswerList, write_answers
from lightning_moevlm.contracts.batch import Answers, Batch
from lightning_moevlm.model.objectives import AnswerClassification, Draws
from lightning_moevlm.training import VisionLanguageModule
from tests.small_model import cut, small_decoder, small_limoe, small_vl_moe, uneven_batch
from tests.training.test_evaluation import measured


@pytest.fixture
def answers_file(tmp_path: Path) -> str:
    write_answers(AnswerList(("yes", "no", "two"), (5, 4, 1), "digest"), tmp_path / "answers.json")
    return str(tmp_path / "answers.json")


def asked(num_samples: int = 6) -> Batch:
    given = (("yes",), ("no", "no", "two"), ("two",), ("unheard of",))
    rows = range(num_samples)
    answers = Answers(tuple(given[row % 4] for row in rows), tuple(("is", "count")[row % 2] for row in rows))
    return uneven_batch(num_samples)._replace(answers=answers)


def test_targets_by_hand(answers_file: str) -> None:
    objective = AnswerClassification(small_vl_moe().spec, answers_file)
    target = objective.targets(asked(4).answers, torch.device("cpu"))  # type: ignore[arg-type]
    assert torch.allclose(target, torch.tensor([[1, 0, 0], [0, 2 / 3, 1 / 3], [0, 0, 1], [0, 0, 0.0]]))


@pytest.mark.parametrize("build", [small_vl_moe, small_limoe, small_decoder])
def test_evaluation_does_not_depend_on_the_batch_size(build: type, answers_file: str) -> None:
    module = VisionLanguageModule(build(), partial(AnswerClassification, answers=answers_file), init_std=0.3)
    whole = asked(25)
    expected = measured(module, [whole])
    assert {"val/vqa_accuracy/all", "val/vqa_accuracy/count", "val/vqa_majority/is", "val_loss/answer"} <= set(expected)
    parts = [
        part._replace(answers=whole.answers.select(range(start, start + part.num_samples)))  # type: ignore[union-attr]
        for start, part in zip(range(0, 25, 4), cut(whole, 4), strict=True)
    ]
    assert measured(module, parts) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("build", [small_limoe, small_decoder])
def test_a_blind_model_does_not_see_the_image(build: type, answers_file: str) -> None:
    backbone, batch = build().eval(), asked()
    darker = batch._replace(images_BRYX=255 - batch.images_BRYX)  # type: ignore[operator]
    for sees, is_equal in ((True, False), (False, True)):
        objective = AnswerClassification(backbone.spec, answers_file, sees_images=sees).eval()
        losses = [objective(backbone, each, Draws(0)).terms["answer"].raw for each in (batch, darker)]
        assert torch.equal(*losses) == is_equal


def test_what_it_lacks_is_told(answers_file: str, tmp_path: Path) -> None:
    objective = AnswerClassification(small_vl_moe().spec, answers_file)
    with pytest.raises(UserError, match=r"set data\.annotation to answers"):
        objective(small_vl_moe(), uneven_batch(3), Draws(0))
    with pytest.raises(UserError, match="moevlm data answers SET"):
        AnswerClassification(small_vl_moe().spec, str(tmp_path / "missing.json"))
    (tmp_path / "other.json").write_text('{"answers": ["yes", "yes"], "counts": [1, 1], "manifest": ""}')
    with pytest.raises(UserError, match="or one twice"):
        AnswerClassification(small_vl_moe().spec, str(tmp_path / "other.json"))
