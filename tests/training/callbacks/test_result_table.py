import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from lightning_moevlm.cli.main import main
from lightning_moevlm.training.callbacks.result_table import result_table
from tests.small_run import SMALL, budget

TABLE = "lightning_moevlm.training.callbacks.result_table.ResultTable"
ALONE = f"--trainer.callbacks=[{TABLE}]"
FEATURES = "lightning_moevlm.training.callbacks.FeatureWriter"


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    capfd.readouterr()
    code = main(list(arguments))
    out, err = capfd.readouterr()
    assert code == 0, err
    return out, err


def test_a_row_has_value_unit_and_meaning() -> None:
    metrics = {"val/task_loss": 12.5, "val/accuracy_text": 0.0, "own": float("nan"), "val/total_loss": 1.25e-7}
    shown = io.StringIO()
    Console(file=shown, width=100).print(result_table(metrics, "validate"))
    title, _, *lines = (line.strip() for line in shown.getvalue().splitlines() if line.strip())
    assert title == "validate"
    assert [re.split(r"\s{2,}", line) for line in lines if not line.startswith("──")] == [
        ["own", "nan"],
        ["val/accuracy_text", "0", "fraction", "accuracy of predicted classes"],
        ["val/task_loss", "12.5000", "sum of term losses", "task loss"],
        ["val/total_loss", "1.25e-07", "sum of term losses", "total loss"],
    ]


@pytest.mark.parametrize(("command", "stage"), [("validate", "val"), ("test", "test")])
@pytest.mark.usefixtures("workplace")
def test_an_evaluation_shows_its_metrics_once(command: str, stage: str, capfd: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capfd, command, *SMALL, ALONE, "--trainer.logger=false", "--trainer.limit_test_batches=1")
    assert out.count(f"{stage}/task_loss ") == 1
    assert out.count(f"{stage}/accuracy_pair_text ") == 1
    assert "accuracy of predicted" in " ".join(out.split())


@pytest.mark.usefixtures("workplace")
def test_fit_shows_no_table(capfd: pytest.CaptureFixture[str]) -> None:
    out, err = run(capfd, "fit", *SMALL, *budget(2, val_every=1), ALONE, "--trainer.logger=false")
    assert "task_loss" not in out + err


def test_predict_prints_the_folder_of_its_files(workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    added = f"--trainer.callbacks+={FEATURES}"  # as the warning tells
    out, err = run(capfd, "predict", *SMALL, ALONE, added, "--trainer.limit_predict_batches=2")
    folder = workplace / "runs/features"
    assert len(list(folder.iterdir())) == 2
    assert f"2 files with features: {folder}" in out.splitlines()
    assert "predictions are not saved" not in err


@pytest.mark.usefixtures("workplace")
def test_predict_warns_where_nothing_keeps_the_predictions(
    moevlm: Callable[..., str],
) -> None:
    printed = moevlm("predict", *SMALL, ALONE, "--trainer.limit_predict_batches=1")
    (line,) = [line for line in printed.splitlines() if "predictions are not saved" in line]
    assert line.endswith(f"--trainer.callbacks+={FEATURES}")
