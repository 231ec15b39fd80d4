"""A decoder trained in three stages, as a user does it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Moevlm = Callable[..., str]
BACKBONE = "--model.backbone.init_args"
BASE = [
    "fit", "-c", "conf/decoder/quickstart.yaml", "--data.batch_size=4", "--data.image_size=32", "--trainer.max_steps=2",
    "--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=1",
    "--trainer.num_sanity_val_steps=0", f"{BACKBONE}.dim=16", f"{BACKBONE}.num_heads=2", f"{BACKBONE}.num_blocks=2",
    f"{BACKBONE}.hidden_dim=32", f"{BACKBONE}.moe.init_args.experts.init_args.hidden_dim=32",
    f"{BACKBONE}.vision={{dim: 16, num_heads: 2, num_blocks: 2, hidden_dim: 96}}",
]  # fmt: skip
STAGES = ("1_connector", "2_dense", "3_experts")


def stage(name: str) -> list[str]:
    return [*BASE, "-c", f"conf/decoder/stages/{name}.yaml"]


def saved(name: str) -> tuple[dict[str, torch.Tensor], int]:
    """Weights, and the number of tensors that the optimiser holds."""
    checkpoint: dict[str, Any] = torch.load(f"runs/decoder/{name}/model.ckpt", weights_only=True)
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    return checkpoint["state_dict"], sum(len(group["params"]) for group in groups)


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in one.keys() & other.keys() if not torch.equal(one[name], other[name])}


def test_the_stages_go_on_from_each_other(moevlm: Moevlm, workplace: Path) -> None:
    assert "no checkpoint at runs/decoder/1_connector/model.ckpt" in moevlm(*stage("2_dense"), code=2)
    for name in STAGES:
        moevlm(*stage(name))
    (first, num_first), (second, num_second), (third, num_third) = map(saved, STAGES)
    assert num_first == len([name for name in first if name.startswith("backbone.connector.")]) == 4
    assert first.keys() == second.keys() and num_second == len(second)
    parts = {"backbone.blocks", "backbone.connector", "backbone.norm", "backbone.text", "backbone.vision"}
    assert {".".join(name.split(".")[:2]) for name in differing(first, second)} == parts | {"objective.text_head"}
    assert {name.rpartition(".")[0] for name in third.keys() - second.keys()} == {
        f"backbone.blocks.1.ffn.{part}" for part in ("experts", "router")
    }
    assert differing(second, third) == {f"backbone.blocks.0.ffn.{matrix}.weight" for matrix in ("up", "down")}
    assert num_third == 5
    records = {text.splitlines()[0]: text for text in map(Path.read_text, workplace.rglob("init_from.txt"))}
    assert records.keys() == {f"runs/decoder/{name}/model.ckpt" for name in STAGES[:2]}
    assert "backbone.blocks.1.ffn differs from its dense start by" in records["runs/decoder/2_dense/model.ckpt"]
