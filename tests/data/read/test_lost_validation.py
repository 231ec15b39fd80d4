"""Two ranks of Lightning evaluate a set, and one loses a whole batch: both end, neither waits."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.small_run import SMALL

PROJECT = str(Path(__file__).parents[3])
NUM_BROKEN = 3  # of 6 samples of a rank, in 3 batches of 2: its first batch is lost whole


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_rank_that_loses_a_whole_batch_ends_the_run(scenes_root: Path, workplace: Path) -> None:
    root = Path(shutil.copytree(scenes_root, workplace / "broken"))
    shard = root / "val-000000.tar"
    before = shard.read_bytes()
    data = bytearray(before)
    with tarfile.open(shard) as tar:
        images = [member for member in tar if member.name.endswith(".jpg")][:NUM_BROKEN]
    for image in images:
        data[image.offset_data : image.offset_data + image.size] = bytes(image.size)
    shard.write_bytes(data)
    manifest = root / "manifest.json"
    digests = [hashlib.sha256(each).hexdigest() for each in (before, data)]
    manifest.write_text(manifest.read_text(encoding="utf-8").replace(*digests), encoding="utf-8")
    command = [
        sys.executable, "-m", "lightning_moevlm", "fit", *SMALL, f"--data.root={root}", "--data.batch_size=2",
        "--data.max_lost_fraction=0.9", "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=2",
        "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1.0",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": PROJECT, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 2
    assert "an evaluation batch lost all of its 2 samples" in done.stderr, done.stderr[-3000:]
