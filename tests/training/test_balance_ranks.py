"""The scale of losses, counts and weights does not move with the number of ranks: real processes, real exchange."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.balance_ranks import results


@pytest.mark.slow
def test_two_ranks_train_like_one(tmp_path: Path) -> None:
    # Megatron-LM issues 3672 and 3769, Automodel issue 3359: a loss scaled with the number of data-parallel ranks
    found = tmp_path / "two.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.training.balance_ranks", str(found)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=250, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two, one = torch.load(found, weights_only=True), results(0, 1)
    assert two.keys() == one.keys()
    for case, values in one.items():
        assert values
        for name, value in values.items():
            torch.testing.assert_close(two[case][name], value, msg=lambda text, c=case, n=name: f"{c}, {n}: {text}")
    assert float(one["relu"]["relu_l1"]) == pytest.approx(1.44e-8)
    for moved in ("bias", "smebu", "quantiles"):
        assert any(bool((bias != 0).any()) for bias in one[moved].values())
