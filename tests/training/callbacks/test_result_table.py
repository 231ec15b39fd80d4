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


def test_a_row_has_value_and_meaning_and_beside_it_what_needs_no_model() -> None:
    accuracies = {"val/accuracy_text": 0.0, "val/majority_text": 0.25, "val/majority_image": 0.5}
    metrics = {"val/task_loss": 12.5, "own": float("nan"), "val/total_loss": 1.25e-7, **accuracies}
    shown = io.StringIO()
    Console(file=shown, width=100).print(result_table(metrics, "validate"))
    title, head, *lines = (line.strip() for line in shown.getvalue().splitlines() if line.strip())
    assert (title, re.split(r"\s{2,}", head)) == ("validate", ["metric", "value", "no model", "meaning"])
    assert [re.split(r"\s{2,}", line) for line in lines if not line.startswith("──")] == [
        ["own", "nan"],
        ["val/accuracy_text", "0", "0.2500", "accuracy of predicted classes (fraction)"],
        ["val/majority_image", "0.5000", "accuracy of the majority class (fraction)"],
        ["val/task_loss", "12.5000", "task loss (sum of term losses)"],
        ["val/total_loss", "1.25e-07", "total loss (sum of term losses)"],
    ]


@pytest.mark.parametrize(("command", "stage"), [("validate", "val"), ("test", "test")])
@pytest.mark.usefixtures("workplace")
def test_an_evaluation_shows_its_metrics_once(command: str, stage: str, capfd: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capfd, command, *SMALL, ALONE, "--trainer.logger=false", "--trainer.limit_test_batches=1")
    assert out.count(f"{stage}/task_loss ") == 1
    assert out.count(f"{stage}/accuracy_pair_text ") == 1
    assert "accuracy of predicted" in " ".join(out.split())


@pytest.mark.usefixtures("workplace")
def test_fit_shows_its_first_and_its_last_validation(capfd: pytest.CaptureFixture[str]) -> None:
    def shown(command: str, *arguments: str) -> dict[str, list[str]]:
        out, _ = run(capfd, command, *SMALL, *arguments, ALONE, "--trainer.logger=false")
        lines = (re.split(r"\s{2,}", line.strip()) for line in out.splitlines())
        return {first: rest for first, *rest in lines if rest}

    untrained, fitted = shown("validate"), shown("fit", *budget(2, val_every=1))
    assert fitted["metric"] == ["step 0", "step 2", "no model", "meaning"]
    assert all(key == "metric" or key.startswith("val/") for key in fitted)
    before, after, meaning = fitted["val/task_loss"]
    assert before == untrained["val/task_loss"][0] and float(after) < float(before) and meaning.startswith("task loss")
    assert fitted["val/accuracy_pair_text"][2] == untrained["val/accuracy_pair_text"][1]
    assert "val/total_loss" not in fitted and "val/drop_rate/block1/image" not in fitted


@pytest.mark.usefixtures("workplace")
def test_fit_without_a_second_validation_shows_no_table(capfd: pytest.CaptureFixture[str]) -> None:
    out, err = run(capfd, "fit", *SMALL, *budget(2, val_every=1), ALONE, "--trainer.fast_dev_run=true")
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
