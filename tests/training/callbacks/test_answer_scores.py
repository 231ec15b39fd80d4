"""Generated answers are scored as VQA does, whatever the batch size; questions without images are the blind model."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.answer_list import AnswerList, write_answers
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.read.mixture import Source
from lightning_moevlm.data.write.convert.sources.sets.questions import SetQuestions
from lightning_moevlm.model.generation import Decoding, Generated
from lightning_moevlm.model.metrics.tasks.vqa import vqa_accuracy
from lightning_moevlm.model.objectives import AnswerClassification, Joint, MaskedModelling, NextToken
from lightning_moevlm.training.callbacks import AnswerScores
from tests.data.sources import write_set
from tests.training.callbacks.test_caption_scores import captioner

ANSWERING = partial(NextToken, answers_only=True)
GENERATE = "lightning_moevlm.training.callbacks.tasks.replies.generate"


@pytest.fixture(scope="module")
def questions(scenes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets") / "questions"
    write_set(SetQuestions(scenes_root, None), root)
    return root


def data_of(root: Path, batch_size: int = 32, **options: Any) -> ShardDataModule:
    given = {"annotation": "answers", "append_answer": True}
    return ShardDataModule(str(root), batch_size, 32, 40, 400, **{**given, **options})


def validated(
    data: ShardDataModule, callback: AnswerScores, objective: Callable[..., object] = ANSWERING
) -> dict[str, float]:
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[callback]
    )
    trainer.validate(captioner(objective, max_text_len=40), data, verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/vqa")}


def test_scores_are_those_of_a_loop_over_questions(questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of(questions)
    said: dict[str, str] = {}

    def generate(
        backbone: object, logits: object, images: Tensor, text: Tensor, mask: Tensor, *arguments: Any
    ) -> Generated:
        assert len(images) == len(text)
        for row, key in zip(text, arguments[1], strict=True):
            # what is given is the question alone
            asked[key] = data.tokenizer.decode(row.tolist())
            said[key] = ("yes", "two", "red")[len(said) % 3]
        ids = [[*data.tokenizer.ids(said[key]), 3, 0, 0, 0][:4] for key in arguments[1]]
        return Generated(torch.tensor(ids), torch.zeros(len(text)))

    asked: dict[str, str] = {}
    monkeypatch.setattr(GENERATE, generate)
    found = validated(data, AnswerScores())
    given: dict[str, tuple[tuple[str, ...], str]] = {}
    for batch in data_of(questions, append_answer=False).val_dataloader():
        for row, key in enumerate(batch.keys):
            given[key] = (batch.answers.given[row], batch.answers.kinds[row])  # type: ignore[union-attr]
            assert batch.text_BL is not None
            assert asked[key] == data.tokenizer.decode(batch.text_BL[row].tolist())
    assert said.keys() == given.keys()
    scores = {key: vqa_accuracy(said[key], answers) for key, (answers, _) in given.items()}
    assert found["val/vqa_accuracy/all"] == pytest.approx(sum(scores.values()) / len(scores))
    for kind in ("count", "colour", "existence"):
        of_kind = [scores[key] for key, (_, other) in given.items() if other == kind]
        assert found[f"val/vqa_accuracy/{kind}"] == pytest.approx(sum(of_kind) / len(of_kind))
    assert 0 < found["val/vqa_accuracy/all"] < found["val/vqa_majority/all"]


def test_scores_do_not_depend_on_the_batch_size(questions: Path) -> None:
    callback = AnswerScores(Decoding("sample", max_new_tokens=3, seed=1), share=0.5)
    counted: list[float] = []
    compute = callback._scores.scores
    callback._scores.scores = lambda: counted.append(compute()["all"].num_questions) or compute()  # type: ignore[method-assign, func-returns-value]
    expected = validated(data_of(questions), callback)
    assert validated(data_of(questions, 5), callback) == pytest.approx(expected)
    number = data_of(questions).manifest.num_samples("val")  # type: ignore[union-attr]
    assert counted[0] == counted[1] and 0.3 * number < counted[0] < 0.7 * number


def test_questions_alone_are_answered_without_images(questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def generate(backbone: object, logits: object, images: object, text: Tensor, *arguments: object) -> Generated:
        seen.append(images)
        return Generated(torch.full((len(text), 2), 3), torch.zeros(len(text)))

    monkeypatch.setattr(GENERATE, generate)
    sources = {"blind": Source(str(questions), modality="text")}
    data = ShardDataModule(None, 32, 32, 40, 400, annotation="answers", append_answer=True, sources=sources)  # type: ignore[arg-type]
    assert validated(data, AnswerScores())["val/vqa_accuracy/all"] == 0
    assert seen and set(seen) == {None}


def test_what_does_not_answer_by_text_is_refused(questions: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="NextToken, or a Joint with it"):
        validated(data_of(questions), AnswerScores(), MaskedModelling)
    with pytest.raises(UserError, match=r"set answers_only of NextToken to true, and data\.append_answer to true"):
        validated(data_of(questions), AnswerScores(), NextToken)
    with pytest.raises(UserError, match="share of AnswerScores"):
        AnswerScores(share=1.5)
    write_answers(AnswerList(("yes", "no"), (2, 1), "digest"), tmp_path / "answers.json")
    both = {"text": ANSWERING, "list": partial(AnswerClassification, answers=str(tmp_path / "answers.json"))}
    with pytest.raises(UserError, match="both log VQA accuracy: remove the callback, or that part"):
        validated(data_of(questions), AnswerScores(), partial(Joint, parts=both))
