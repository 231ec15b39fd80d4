"""A router of another package: listed, accepted by class_path and by short name, without an edit here."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PROJECT
from tests.small_run import SMALL, budget

MODULE = '''
from dataclasses import dataclass

import torch
from lightning.pytorch import Callback

from lightning_moevlm.model.losses import LossInput, RoutingLoss
from lightning_moevlm.contracts.routing_plan import PairPlan, RoutingInput
from lightning_moevlm.model.routers import Router
from lightning_moevlm.model.routers.choices import make_plan


class HalfSGD(torch.optim.SGD):
    """SGD at half the rate."""


class Onlooker(Callback):
    """Looks on."""


@dataclass(frozen=True)
class MostProbable(RoutingLoss):
    """Mean of the largest probability."""

    weight: float = 0.5

    def __call__(self, inputs: LossInput) -> torch.Tensor:
        return inputs.plan.probs_TE.max(dim=-1).values.mean()


class FirstExpertRouter(Router):
    """Everybody to one expert.

    Args:
        dim: model width D.
        num_experts: E.
        expert: which one.
    """

    def __init__(self, dim: int, num_experts: int, expert: int = 0) -> None:
        super().__init__(dim, num_experts)
        self.expert = expert

    @property
    def experts_per_token(self) -> float:
        return 1.0

    def forward_flops_per_token(self) -> int:
        return 0

    def forward(self, inputs: RoutingInput) -> PairPlan:
        num_tokens = inputs.valid_T.shape[0]
        logits = torch.zeros(num_tokens, self.num_experts)
        expert = torch.full((num_tokens, 1), self.expert)
        return make_plan(inputs, logits, logits.softmax(-1), expert, torch.ones(num_tokens, 1))
'''


@pytest.fixture
def plugin(tmp_path: Path) -> dict[str, str]:
    """An environment in which the package `elsewhere` is installed, as pip leaves it."""
    site = tmp_path / "site"
    info = site / "elsewhere-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "elsewhere.py").write_text(MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lightning_moevlm.plugins]\nelsewhere = elsewhere\n")
    return os.environ | {"PYTHONPATH": f"{site}:{PROJECT}", "OMP_NUM_THREADS": "1"}


def test_router_of_another_package(plugin: dict[str, str], workplace: Path) -> None:
    router = "--model.backbone.init_args.moe.init_args.router"
    off = [f"--model.losses.{loss}=null" for loss in ("load_balance", "router_z")]  # it has no weights to teach
    commands = [
        ["list", "routers"],
        ["list", "optimizers"],
        ["list", "callbacks"],
        ["list", "losses"],
        ["describe", "FirstExpertRouter"],
        ["fit", *SMALL, *budget(1), *off, f"{router}=FirstExpertRouter"],
        [
            "fit",
            *SMALL,
            *budget(1),
            *off,
            f"{router}=elsewhere.FirstExpertRouter",
            f"{router}.expert=2",
            "--model.optimizer=HalfSGD",
            "--trainer.callbacks+=Onlooker",
        ],
        [
            "fit",
            *SMALL,
            *budget(1),
            "--model.losses.others={sure: {class_path: elsewhere.MostProbable, init_args: {weight: 0.25}}}",
        ],
    ]
    # one fresh process for all: entry points are read once, and importing takes seconds
    script = (
        "import json, sys; from lightning_moevlm.cli.main import main; "
        "sys.exit(sum(map(main, json.loads(sys.argv[1]))))"
    )
    told = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands)], cwd=workplace, env=plugin, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    assert "FirstExpertRouter" in told.stdout and "which one" in told.stdout
    for summary in ("SGD at half the rate.", "Looks on.", "Mean of the largest probability."):
        assert summary in told.stdout
    with sqlite3.connect(workplace / "runs/mlflow.db") as store:
        loads = store.execute(
            "SELECT key, value FROM latest_metrics WHERE key LIKE 'load/block1/text/expert%'"
        ).fetchall()
        weight = store.execute("SELECT value FROM latest_metrics WHERE key = 'loss_weight/sure'").fetchall()
        receipt = store.execute("SELECT value FROM tags WHERE key = 'receipt/losses.others.sure'").fetchall()
    assert weight == [(0.25,)] and receipt[0][0].startswith("alive: ")
    full = sorted(key.rpartition("/")[2] for key, value in loads if value == 1.0)
    assert full == ["expert0", "expert2"]
