"""A configuration that a run has printed or recorded goes with its references into the next run."""

from pathlib import Path

import pytest
import yaml

from lightning_moevlm.cli.main import main

QUICKSTART = ("fit", "-c", "conf/quickstart.yaml")


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit):
        main([*words, "--print_config"])
    return capsys.readouterr().out


def test_a_printed_configuration_used_again_follows_another_budget(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once = printed(capsys, *QUICKSTART, "--model.backbone.init_args.dim=32")
    tree = yaml.safe_load(once)
    assert tree["trainer"]["max_steps"] == 80
    assert tree["model"]["schedule"]["init_args"]["total_steps"] == "${trainer.max_steps}"
    assert tree["model"]["backbone"]["init_args"]["image_size"] == "${data.image_size}"
    assert tree["model"]["seed"] == tree["data"]["seed"] == "${seed_everything}"
    Path("printed.yaml").write_text(once)
    again = printed(capsys, "fit", "-c", "printed.yaml", "--trainer.max_steps=3")
    assert again == once.replace("max_steps: 80", "max_steps: 3")
    # what a flag has set is no reference any more
    fixed = printed(capsys, "fit", "-c", "printed.yaml", "--model.schedule.total_steps=9", "--data.image_size=32")
    assert yaml.safe_load(fixed)["model"]["schedule"]["init_args"]["total_steps"] == 9
    assert yaml.safe_load(fixed)["model"]["backbone"]["init_args"]["image_size"] == "${data.image_size}"


NULLS = {
    "backbone.moe.capacity=null": ("capacity", None),
    "backbone.init_args.moe.init_args.capacity=null": ("capacity", None),
    "backbone.moe.capacity={eval_factor: null, train_factor: 2.0}": ("capacity", {"train_factor": 2.0}),
    "backbone.moe.dispatcher=null": ("dispatcher", None),
}


@pytest.mark.parametrize("word", NULLS)
def test_a_part_within_a_part_may_be_null(word: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, expected = NULLS[word]
    tree = yaml.safe_load(printed(capsys, *QUICKSTART, f"--model.{word}"))
    given = tree["model"]["backbone"]["init_args"]["moe"]["init_args"][name]
    if isinstance(given, dict):
        given = {key: given[key] for key in ("train_factor", "eval_factor") if given[key] is not None}
    assert given == expected
