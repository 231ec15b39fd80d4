"""A trained run from Python: measure it, load it."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.configuration.resolver import load_module
from lightning_moevlm.training import VisionLanguageModule
from tests.small_model import pair_batch, small_vl_moe
from tests.small_run import SMALL, budget
from tests.training.small_fit import Memory

QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_checkpointing": False, "enable_progress_bar": False}


@pytest.mark.parametrize(("name", "stage"), [("validate", "val"), ("test", "test")])
def test_an_evaluation_returns_its_logged_metrics(name: str, stage: str) -> None:
    module, memory = VisionLanguageModule(small_vl_moe()), Memory()
    data = DataLoader([pair_batch()] * 2, batch_size=None)  # type: ignore[arg-type]
    (returned,) = getattr(Trainer(logger=memory, **QUIET), name)(module, data, verbose=False)
    assert returned[f"{stage}/task_loss"] > 0 and f"{stage}/accuracy_text" in returned
    logged = {key: points for key, points in memory.points.items() if key != "epoch"}  # which Lightning adds
    assert logged == {key: [(0, pytest.approx(value, rel=1e-6))] for key, value in returned.items()}


def test_a_module_is_loaded_with_its_parts_or_by_its_run(moevlm: Any, workplace: Path, tmp_path: Path) -> None:
    moevlm("fit", *SMALL, *budget(2), "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs")
    (path,) = workplace.glob("runs/**/last.ckpt")
    with pytest.raises(UserError, match=r"pass backbone=.* or use lightning_moevlm.configuration.resolver.load_module"):
        VisionLanguageModule.load_from_checkpoint(path)
    module = load_module(path)
    assert not module.training and module.backbone.spec.dim == 16
    same = VisionLanguageModule.load_from_checkpoint(path, backbone=module.backbone, weights_only=True)
    for name, value in module.state_dict().items():
        assert value.equal(same.state_dict()[name]), name
    alone = tmp_path / "alone.ckpt"
    alone.write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"has no configuration at .*: pass that of its training, config="):
        load_module(alone)


def test_a_run_outside_mlflow_prints_its_folder(workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from lightning_moevlm.cli.main import main

    assert main(["fit", *SMALL, *budget(1), "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs"]) == 0
    folder = "runs/lightning_logs/version_0"
    told = capfd.readouterr().out.splitlines()
    assert f"Checkpoints and configuration: {folder}" in told
    assert f"Evaluate or resume: moevlm test --run {folder}, moevlm fit --run {folder}" in told
    assert main(["fit", *SMALL, *budget(1), "--trainer.logger=false"]) == 0
    assert f"Checkpoints: {workplace / 'checkpoints'}" in capfd.readouterr().out.splitlines()
    few = "--trainer.limit_test_batches=1"
    assert main(["test", *SMALL, few, "--trainer.logger=false", "--trainer.callbacks=null"]) == 0
    assert (
        "Warning: no checkpoint is given, so the model is untrained; give --run RUN or --ckpt_path FILE"
        in capfd.readouterr().err
    )
    assert main(["test", *SMALL, few, "--trainer.logger=false", f"--ckpt_path={folder}/checkpoints/last.ckpt"]) == 0
    assert "untrained" not in capfd.readouterr().err
