"""Adopted models train on two ranks as on one, and the shipped configuration runs on both. Extra `hf`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'lightning-moevlm[hf]'")

from tests.model.backbones.adopted.answer_ranks import results

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.mark.slow  # two processes import torch and transformers: 20 s of CPU
@pytest.mark.timeout(900)
def test_two_ranks_train_like_one(tmp_path: Path) -> None:
    """Unequal numbers of texts, and of images of other sizes inside conversations, under every balance of the study."""
    found = tmp_path / "two.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.model.backbones.adopted.answer_ranks", str(found)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    two, one = torch.load(found, weights_only=True), results(0, 1)
    assert two.keys() == one.keys()
    for case, values in one.items():
        for name, value in values.items():
            torch.testing.assert_close(two[case][name], value, msg=lambda text, c=case, n=name: f"{c}, {n}: {text}")
    bias = [value for name, value in one["chats, loss_free"].items() if name.endswith("bias_AE")]
    assert len(bias) == 2 and all(bool(each.any()) for each in bias)


@pytest.mark.slow  # the same, on the command line
@pytest.mark.timeout(900)
def test_the_base_of_the_study_trains_on_two_ranks(
    moevlm: Callable[..., str], workplace: Path, scenes_root: Path
) -> None:
    questions = "data/shards/scenes-20k-questions"
    moevlm("data", "convert", "questions", str(scenes_root), "--licence", "CC0", "--out", questions)
    command = [
        sys.executable, "-m", "lightning_moevlm", "fit", "-c", "conf/hugging_face/qwen3_vl_moe.yaml",
        "-c", "conf/hugging_face/questions.yaml", "--trainer.accelerator=cpu", "--trainer.devices=2",
        "--trainer.strategy=ddp_find_unused_parameters_true", "--trainer.max_steps=3", "--trainer.val_check_interval=3",
        "--trainer.limit_val_batches=1", "--data.batch_size=8",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    (receipts,) = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("liveness of switches")]
    assert receipts
    assert list(workplace.glob("runs/*/*/checkpoints/last.ckpt")), json.dumps(done.stdout[-2000:])
