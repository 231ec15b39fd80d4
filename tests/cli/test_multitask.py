"""Four objectives on three sets in one run, as a user trains them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from lightning_moevlm.configuration.resolver import ConfigResolver
from tests.conftest import PROJECT

FILES = ["conf/quickstart.yaml", "conf/tasks/multitask.yaml"]
SMALL = [
    "--data.batch_size=12", "--data.image_size=32", "--model.backbone.init_args.dim=16",
    "--model.backbone.init_args.num_heads=2", "--model.backbone.init_args.hidden_dim=32",
]  # fmt: skip


def test_every_part_is_trained_and_judged_on_its_own_source(moevlm: Callable[..., str], workplace: Path) -> None:
    scenes = "data/shards/scenes"
    for kind in ("questions", "statements"):
        moevlm("data", "convert", kind, scenes, "--licence", "CC0", "--out", f"{scenes}-{kind}")
    moevlm("data", "answers", f"{scenes}-questions")
    fit = ["fit", *(word for file in FILES for word in ("-c", file)), *SMALL]
    moevlm(*fit, "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1")
    client = MlflowClient(f"sqlite:///{workplace}/runs/mlflow.db")
    (run,) = client.search_runs(["1"])
    metrics = run.data.metrics
    terms = ("contrast_contrastive", "caption_caption", "answer_answer", "statement_statement")
    assert all(f"loss/{term}" in metrics and f"val_loss/{term}" in metrics for term in terms)
    assert {"val/vqa_accuracy/all", "val/statement_accuracy/all", "val/recall_at_1/image_to_text"} <= metrics.keys()
    assert metrics["data/samples/scenes"] == metrics["data/samples/questions"] == 8  # two steps of a third of 12
    other = ["--model.objective.init_args.sources.contrast=[pictures]", "--trainer.fast_dev_run=true"]
    assert "data.sources has questions, scenes, statements" in moevlm(*fit, *other, code=2)


@pytest.fixture(scope="module")
def resolver() -> ConfigResolver:
    return ConfigResolver()


def test_a_file_changes_one_part_and_leaves_the_others(
    resolver: ConfigResolver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data/shards/scenes-questions").mkdir(parents=True)
    (tmp_path / "data/shards/scenes-questions/answers.json").write_text(
        json.dumps({"answers": ["yes", "no"], "counts": [2, 1], "manifest": "of a set"}), encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)

    def options(overrides: object) -> dict:
        files = [PROJECT / file for file in FILES]
        resolved = resolver(files, {"model": {"objective": overrides}})
        return resolved["model"]["objective"]["init_args"]  # type: ignore[index, no-any-return]

    before = options({})
    assert list(before["parts"]) == ["contrast", "caption", "answer", "statement"]
    blind = options({"init_args": {"parts": {"answer": {"init_args": {"sees_images": False}}}}})
    assert blind["parts"]["answer"]["init_args"] == {**before["parts"]["answer"]["init_args"], "sees_images": False}
    assert {**blind["parts"], "answer": before["parts"]["answer"]} == before["parts"]
    assert options({"init_args": {"sources": {"caption": ["questions"]}}})["sources"] == {
        **before["sources"],
        "caption": ["questions"],
    }
    # a file that names the class gives all of its parts
    whole = options({"class_path": "Joint", "init_args": {"parts": {"one": {"class_path": "MaskedModelling"}}}})
    assert list(whole["parts"]) == ["one"]
