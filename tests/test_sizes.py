"""Sizes that the data and the model share: carried over to another class of backbone, else held against each other."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lightning_moevlm.cli.main import main
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.configuration.resolver import ConfigResolver, describe_model
from tests.small_run import SMALL, budget

Moevlm = Callable[..., str]
BACKBONE = "model.backbone.init_args"


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, dict[str, object]]:
    with pytest.raises(SystemExit):
        main(["fit", "-c", "conf/quickstart.yaml", *words, "--print_config"])
    options: dict[str, dict[str, object]] = yaml.safe_load(capsys.readouterr().out)["model"]["backbone"]
    return options


@pytest.mark.usefixtures("workplace")
def test_another_class_of_backbone_keeps_the_sizes_that_both_have(capsys: pytest.CaptureFixture[str]) -> None:
    backbone = printed(capsys, "--model.backbone", "LIMoE")
    assert str(backbone["class_path"]).endswith("LIMoE")
    kept = ("dim", "patch_size", "image_size", "vocab_size", "max_text_len")
    assert [backbone["init_args"][name] for name in kept] == [
        64, 16, "${data.image_size}", "${data.vocab_size}", "${data.max_text_len}"
    ]  # fmt: skip


@pytest.mark.usefixtures("workplace")
def test_a_reference_on_the_command_line_is_seen_from_the_root(capsys: pytest.CaptureFixture[str]) -> None:
    backbone = printed(capsys, f"--{BACKBONE}.hidden_dim=${{data.batch_size}}")
    assert backbone["init_args"]["hidden_dim"] == "${data.batch_size}"


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (
            "image_size=64",
            "data.image_size is 32, but the model is built for 64: set model.backbone.init_args.image_size",
        ),
        ("vocab_size=100", "data.vocab_size is 640, but the model is built for 100"),
        ("max_text_len=8", "data.max_text_len is 24, but the model is built for 8"),
    ],
)
def test_data_that_the_model_has_no_places_for_is_refused_before_the_run(
    option: str, told: str, moevlm: Moevlm, workplace: Path
) -> None:
    before = sorted(workplace.rglob("*"))
    assert told in moevlm("fit", *SMALL, *budget(2), f"--{BACKBONE}.{option}", code=2)
    assert sorted(workplace.rglob("*")) == before


def test_a_study_refuses_it_when_it_is_planned(workplace: Path) -> None:
    resolved = ConfigResolver()([Path("conf/quickstart.yaml")], {"data": {"image_size": 64}})
    resolved["data"]["image_size"] = 32  # type: ignore[index]
    with pytest.raises(UserError, match=r"data.image_size is 32, but the model is built for 64"):
        describe_model(resolved)
