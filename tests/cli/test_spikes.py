"""`moevlm spikes` on a real run with a planted burst of noise: text, records, page, and refusals in a line."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_moevlm.cli.main import main
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.training.callbacks import StepProgress
from tests.conftest import run_in
from tests.small_run import SMALL, budget

STEPS = 48
PLANTED = random.Random("spikes").randrange(34, 43)


def spoil(self: StepProgress, trainer: Trainer, module: torch.nn.Module, batch: Batch, *_: object) -> None:
    """Replace the images and the words of two batches by noise."""
    if PLANTED <= trainer.global_step + 1 < PLANTED + 2:
        assert batch.images_BRYX is not None and batch.text_BL is not None
        batch.images_BRYX.random_(0, 256)
        words = torch.randint_like(batch.text_BL, 10, 400)
        batch.text_BL.copy_(torch.where(batch.text_BL > 9, words, batch.text_BL))


@pytest.fixture(scope="module")
def spoiled(shared_workplace: Path) -> tuple[Path, Path]:
    """A workplace and the folder of a run in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepProgress, "on_train_batch_start", spoil)
        run_in(shared_workplace, "fit", *SMALL, *budget(STEPS), "--trainer.logger.init_args.run_name=noisy")
    (run,) = shared_workplace.glob("runs/*/*/recordings")
    return shared_workplace, run.parent


@pytest.fixture
def at_work(spoiled: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(spoiled[0])
    return spoiled[1]


def records(*arguments: str) -> list[dict[str, Any]]:
    assert main(["spikes", *arguments, "--json", "found.json"]) == 0
    found: list[dict[str, Any]] = json.loads(Path("found.json").read_text())
    return found


def test_the_burst_is_found_by_name_and_by_folder(at_work: Path) -> None:
    found = records("noisy")
    assert found[0]["step"] == PLANTED and found[0]["events"][0]["kind"] == "spike"
    assert found[0]["first_term"] and found[0]["moved"][0]["step"] == PLANTED
    assert found[0]["illnesses"][0]["name"] == "a bad batch"
    assert "ablations/cures/noise_images.yaml" in found[0]["illnesses"][0]["cure_studies"]
    assert len(found[0]["keys"]["scenes"]) == 8
    assert records(str(at_work)) == found
    (file,) = (at_work / "recordings").glob("*.safetensors")
    assert file.stat().st_size < 500_000
    assert records(str(file)) == found


def test_the_page_shows_the_samples_of_the_batch(at_work: Path) -> None:
    (first, *_) = records("noisy")
    page = Path(first["page"]).read_text()
    assert f"Step {PLANTED} (spike): 8 samples of scenes" in page
    assert page.count("<article>") == 8 and all(f"<h2>{key}</h2>" in page for key in first["keys"]["scenes"])


def test_the_text_names_what_moved_and_what_to_switch_on(at_work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["spikes", "noisy"]) == 0
    shown = capfd.readouterr().out
    assert f"Step {PLANTED}: spike total loss" in shown
    assert "first term: " in shown and "a bad batch: " in shown and "switch on model.gradient.skip_spikes" in shown
    assert "cures tried: ablations/cures/noise_images.yaml, ablations/cures/repeated_samples.yaml" in shown


def test_the_recording_is_an_artifact_of_the_run(at_work: Path) -> None:
    (file,) = (at_work / "recordings").glob("*.safetensors")
    (kept,) = Path("runs/artifacts").rglob("recordings/*.safetensors")
    assert kept.read_bytes() == file.read_bytes()


def test_a_recording_alone_is_explained_without_a_page(at_work: Path, tmp_path: Path) -> None:
    (file,) = (at_work / "recordings").glob("*.safetensors")
    mailed = tmp_path / file.name
    mailed.write_bytes(file.read_bytes())
    first, *_ = records(str(mailed))
    assert first["page"] is None and "give --data SET and --out FOLDER" in first["no_page"]
    first, *_ = records(str(mailed), "--data", "data/shards/scenes", "--out", str(tmp_path / "pages"))
    assert Path(first["page"]).parent == tmp_path / "pages"


def test_mistakes_are_refused_in_a_line(
    at_work: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("none")
    for run, words in (
        ("nosy", "has the name 'nosy'"),
        ("runs/9/nothing", "there is no folder runs/9/nothing"),
        (str(tmp_path / "empty"), "has no recording"),
        (str(tmp_path / "text.safetensors"), "is not a recording"),
        (str(tmp_path / "none.safetensors"), "there is no file"),
    ):
        assert main(["spikes", run]) == 2
        assert words in capfd.readouterr().err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert main(["spikes", "noisy"]) == 2
    assert "does not answer as an MLflow server" in capfd.readouterr().err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    assert main(["spikes", "noisy"]) == 2
    assert "no database" in capfd.readouterr().err
