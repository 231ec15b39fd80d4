"""Ranks agree on dead switches, so that none waits for another that has ended."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_switch_that_is_dead_on_one_rank_ends_both(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.training.callbacks.liveness_ranks", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=250, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    for found in (first, second):
        assert found["contrast"]  # rehearsals contrast the samples of one rank, so that none waits
        assert found["receipts"]["losses.load_balance"].startswith("alive: ")
        assert [step for step, _ in found["points"]["balance_gradient_share/router"]] == [0, 1]
    assert first["told"] == "losses.load_balance is dead before the first step on another rank"
    assert second["told"].startswith("losses.load_balance is dead before the first step: its gradient reaches none of")
