"""Mappings that take any key: an entry that is set alone leaves the others as they are."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lightning_moevlm.cli.training import _with_shipped_configs
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.yaml_text import read_yaml
from lightning_moevlm.configuration.resolver import ConfigResolver
from tests.conftest import PROJECT

MODEL = "conf/hugging_face/qwen3_vl_moe.yaml"


def last_config(words: list[str], folder: Path) -> Any:
    """Return the model's configuration as the parser gets it last."""
    found: Any = None
    for flag, file in pairwise(words):
        if flag == "-c":
            backbone = read_yaml(Path(file).read_text("utf-8"))["model"]["backbone"]
            found = backbone.get("init_args", backbone).get("config", found)
    return found


@pytest.mark.parametrize(
    "options",
    [
        ["--model.backbone.config.text_config.num_experts", "16"],
        ["--model.backbone.init_args.config.text_config.num_experts=16"],
        ["--model.backbone.config", "{text_config: {num_experts: 16}}"],
        ["-c", "one.yaml"],
        ["-c", "short.yaml"],
    ],
    ids=["option", "long_option", "mapping", "file", "short_file"],
)
def test_one_size_of_a_model_leaves_the_others(options: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    base = PROJECT / MODEL
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.yaml").write_text("model: {backbone: {init_args: {config: {text_config: {num_experts: 16}}}}}")
    (tmp_path / "short.yaml").write_text("model: {backbone: {config: {text_config: {num_experts: 16}}}}")
    words = _with_shipped_configs(["fit", "-c", str(base), *options, "--trainer.max_steps", "3"], tmp_path)
    assert words[0] == "fit"
    assert words[-2:] == ["--trainer.max_steps", "3"]
    expected = read_yaml(base.read_text("utf-8"))["model"]["backbone"]["init_args"]["config"]
    assert expected["text_config"]["num_experts"] == 8
    expected["text_config"]["num_experts"] = 16
    assert last_config(words, tmp_path) == expected


def test_another_family_or_null_begins_anew(tmp_path: Path) -> None:
    base = ["fit", "-c", str(PROJECT / MODEL)]
    for options, expected in (
        (["--model.backbone.config", "{model_type: olmoe, num_experts: 4}"], {"model_type": "olmoe", "num_experts": 4}),
        (["--model.backbone.config", "null"], None),
        (["--model.backbone.config=null", "--model.backbone.config.model_type=olmoe"], {"model_type": "olmoe"}),
    ):
        words = _with_shipped_configs([*base, *options], tmp_path)
        files = [Path(file) for flag, file in pairwise(words) if flag == "-c"]
        last = read_yaml(files[-1].read_text("utf-8"))["model"]["backbone"]["init_args"]["config"]
        assert last == expected


def test_values_are_read_as_yaml(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--model\.backbone\.config\.layers: \[1 is not a valid value"):
        _with_shipped_configs(["fit", "--model.backbone.config.layers", "[1"], tmp_path)
    words = _with_shipped_configs(["fit", "--data.chat.options.max_pixels", "400"], tmp_path)
    assert read_yaml(Path(words[2]).read_text("utf-8")) == {"data": {"chat": {"options": {"max_pixels": 400}}}}


def test_arms_and_overlays_merge_in_the_resolved_configuration() -> None:
    overlay = {"model": {"backbone": {"config": {"text_config": {"num_experts_per_tok": 4}}}}}
    files = [PROJECT / MODEL, PROJECT / "conf/hugging_face/questions.yaml"]
    resolved: Any = ConfigResolver()(files, overlay)
    text = resolved["model"]["backbone"]["init_args"]["config"]["text_config"]
    assert (text["num_experts_per_tok"], text["num_hidden_layers"], text["hidden_size"]) == (4, 2, 64)
