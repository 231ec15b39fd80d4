"""Whole runs on a GPU: dense and sparse models of each family train there, with all that watches them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.data.found_tars import folder_of, keep, three_tars

DENSE = ("--model.backbone.init_args.sparse_modalities=[]",)
MODELS = {
    "vl_moe": ("conf/quickstart.yaml",),
    "vl_moe_dense": ("conf/quickstart.yaml", *DENSE),
    "limoe": ("conf/limoe_quickstart.yaml",),
    "moma": ("conf/moma/quickstart.yaml",),
    "decoder": ("conf/decoder/quickstart.yaml",),
}
DEVICE = "gpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", MODELS)
def test_a_run_on_a_gpu_ends_well(name: str, precision: str, moevlm: Callable[..., str], tmp_path: Path) -> None:
    keep(folder_of(tmp_path / "web", *three_tars(60)), tmp_path / "set")
    config, *options = MODELS[name]
    moevlm(
        "fit", "-c", config, *options, f"--data.root={tmp_path / 'set'}", f"--trainer.accelerator={DEVICE}",
        f"--trainer.precision={precision}", "--data.batch_size=8", "--trainer.max_steps=3",
        "--trainer.val_check_interval=3", "--trainer.log_every_n_steps=1",
    )  # fmt: skip
    assert list(Path("runs").rglob("last.ckpt"))
