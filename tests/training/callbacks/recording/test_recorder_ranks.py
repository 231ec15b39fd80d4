"""Two ranks: the first writes, with the losses and keys of both."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_moevlm.tracking.recordings.recording import read_recording


@pytest.mark.slow
def test_rank_0_writes_the_losses_and_keys_of_both(tmp_path: Path) -> None:
    """Starts two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.training.callbacks.recording.recorder_ranks", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=250, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "recordings").iterdir()
    recording = read_recording(file)
    assert [(event.step, event.kind) for event in recording.events] == [(3, "not finite")]
    assert recording.about["ranks"] == "2"
    batches = [{key.partition("/")[0] for key in one.keys[""]} for one in recording.steps]
    assert [len(one.keys[""]) for one in recording.steps] == [16] * 4
    assert [len(each) for each in batches] == [4] * 4  # two micro-batches on each of two ranks
    assert len(set.union(*batches)) == 16
