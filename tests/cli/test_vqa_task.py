"""From a set with questions to a trained model that answers them, as a user does it."""

import json
from collections.abc import Callable
from pathlib import Path

from tests.data.statement_set import read_members

QUESTIONS = "data/shards/scenes-questions"
CONVERT = ["data", "convert", "questions", "data/shards/scenes", "--licence", "CC BY-SA 4.0", "--out", QUESTIONS]
SMALL = [
    "--data.batch_size=4", "--data.image_size=32", "--model.backbone.init_args.dim=16",
    "--model.backbone.init_args.num_heads=2", "--model.backbone.init_args.hidden_dim=32", "--data.vocab_size=640",
]  # fmt: skip


def test_questions_become_samples_and_a_model_answers_them(
    moevlm: Callable[..., str], workplace: Path, scenes_root: Path
) -> None:
    missing = moevlm("fit", "-c", "conf/quickstart.yaml", "-c", "conf/tasks/vqa.yaml", code=2)
    assert "moevlm data answers SET" in missing or "moevlm data" in missing
    moevlm(*CONVERT)
    made = workplace / QUESTIONS
    for split in ("train", "val", "test"):
        images, asked = read_members(scenes_root, split), read_members(made, split)
        expected = {
            f"{key}-q{number}": (members["jpg"], question["question"], [question["answer"]], question["kind"])
            for key, members in images.items()
            for number, question in enumerate(json.loads(members["json"])["questions"])
        }
        found = {
            key: (members["jpg"], members["txt"].decode(), about["answers"], about["kind"])
            for key, members in asked.items()
            for about in [json.loads(members["json"])]
        }
        assert found == expected  # every question of every image, in the image's own split, bytes unchanged
    assert (made / "tokenizer.json").read_bytes() == (scenes_root / "tokenizer.json").read_bytes()
    moevlm("data", "answers", QUESTIONS)
    counted = json.loads((made / "answers.json").read_text())
    train = [json.loads(members["json"])["answers"][0] for members in read_members(made, "train").values()]
    assert dict(zip(counted["answers"], counted["counts"], strict=True)) == {each: train.count(each) for each in train}
    assert counted["counts"] == sorted(counted["counts"], reverse=True)
    fit = ["-c", "conf/quickstart.yaml", "-c", "conf/tasks/vqa.yaml", *SMALL]
    moevlm("fit", *fit, "--trainer.fast_dev_run=true")
    moevlm("fit", *fit, "--trainer.fast_dev_run=true", "--data.num_workers=2")  # answers cross processes
    unmeasured = moevlm("test", *fit, "--trainer.fast_dev_run=true", "--data.annotation=null", code=2)
    assert "nothing was measured: model.objective AnswerClassification can use no sample of this data" in unmeasured
    as_text = ["fit", "-c", "conf/decoder/quickstart.yaml", "-c", "conf/tasks/vqa_as_text.yaml", *SMALL]
    moevlm(*as_text, "--trainer.fast_dev_run=true")
    lacking = moevlm(*as_text, "--trainer.fast_dev_run=true", "--data.annotation=null", code=2)
    assert "data.append_answer is true, and no answers are read: set data.annotation to answers" in lacking


def test_what_holds_no_questions_is_refused_in_one_line(moevlm: Callable[..., str]) -> None:
    assert "moevlm data build" in moevlm(*CONVERT[:3], "data/shards/nowhere", *CONVERT[4:], code=2)
    plain = ["fit", "-c", "conf/quickstart.yaml", "--data.annotation=answers", "--trainer.fast_dev_run=true", *SMALL]
    assert "has no answers; make a set of questions first, `moevlm data convert questions SET" in moevlm(*plain, code=2)
