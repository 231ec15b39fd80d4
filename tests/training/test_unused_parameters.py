"""Sets of one modality, mixtures and terms without a weight train under DDP as in a single process."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_moevlm.training.unused_parameters import parts_without_gradient
from tests.training.unused_ranks import CASES, OF_ONE_RANK, joined, trained


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lightning leaves the process group and its variables behind."""
    before = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("case", CASES)
def test_a_batch_that_does_not_reach_every_parameter_trains_under_ddp(case: str) -> None:
    # DDP with one rank, too, refuses a second step while parameters of the first wait for a gradient
    ddp, plain = (trained(case, joined(case), strategy=strategy) for strategy in ("ddp", "auto"))
    before = trained(case, joined(case), steps=0)
    for name, value in plain.items():
        assert torch.equal(ddp[name], value), name
    assert any(not torch.equal(before[name], value) for name, value in plain.items())


def test_the_parts_without_a_gradient_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        trained("texts alone", joined("texts alone"), steps=2)
    (line,) = [record.getMessage() for record in caplog.records if "no gradient" in record.getMessage()]
    parts = line.partition(": ")[2].split(", ")
    assert {"backbone.patches", "objective.image_head"} <= set(parts) and "objective.text_head" not in parts
    caplog.clear()
    trained("pairs", joined("pairs"), steps=1)
    assert "no gradient" not in caplog.text


def test_the_largest_parts_by_hand() -> None:
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Sequential(torch.nn.Linear(2, 2))})
    module["a"].weight.grad = torch.zeros(2, 2)
    assert parts_without_gradient(module) == ["b", "a.bias"]
    module["b"].requires_grad_(False)
    assert parts_without_gradient(module) == ["a.bias"]


@pytest.mark.slow
def test_two_ranks_without_every_modality_equal_one_process_on_the_joined_batch(tmp_path: Path) -> None:
    found = tmp_path / "two.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.training.unused_ranks", str(found)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=250, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = torch.load(found, weights_only=True)
    assert two.keys() == CASES.keys()
    for case in CASES.keys() - set(OF_ONE_RANK):
        before, one = trained(case, joined(case), steps=0), trained(case, joined(case))
        for name, value in one.items():
            moved = (value - before[name]).norm()
            assert float((two[case][name] - value).norm()) <= 1e-3 * float(moved), f"{case}: {name}"
