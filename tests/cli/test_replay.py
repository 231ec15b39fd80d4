"""`moevlm replay` on a real run with a planted burst of noise: the proof, the answers, resuming, refusals in a line."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_moevlm.cli.main import main
from lightning_moevlm.cli.runs import replay as command
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.tracking.read.runs import find_runs_anywhere
from lightning_moevlm.training.callbacks import DivergenceGuard
from tests.replaying import InProcess
from tests.small_run import SMALL, budget

STEPS, VAL_EVERY = 46, 30
PLANTED = random.Random("replay").randrange(34, 41)
NOISY: set[str] = set()
"""Keys of the burst, which the first run meets."""


def spoil(self: DivergenceGuard, trainer: Trainer, module: torch.nn.Module, batch: Batch, *_: object) -> None:
    """Replace the images and words of two batches by noise that belongs to the samples."""
    if not PLANTED <= trainer.global_step + 1 < PLANTED + 2:
        return
    if len(NOISY) < 16:
        NOISY.update(batch.keys)
    rows = torch.tensor([key in NOISY for key in batch.keys])
    assert batch.images_BRYX is not None and batch.text_BL is not None
    generator = torch.Generator().manual_seed(trainer.global_step)
    images = torch.randint(0, 256, batch.images_BRYX.shape, generator=generator, dtype=torch.uint8)
    words = torch.randint(10, 400, batch.text_BL.shape, generator=generator)
    batch.images_BRYX[rows] = images[rows]
    batch.text_BL[rows] = torch.where(batch.text_BL > 9, words, batch.text_BL)[rows]


class Place:
    """A workplace with a run named noisy, and the engine of its replays."""

    def __init__(self, folder: Path, run: Path) -> None:
        self.folder, self.run = folder, run
        self.engine = InProcess()

    def replay(self, *arguments: str, code: int = 0) -> list[dict[str, Any]]:
        """Replay and return the records."""
        assert main(["replay", "noisy", *arguments, "--steps=4", "--json", "found.json"]) == code
        found: list[dict[str, Any]] = json.loads(Path("found.json").read_text())
        return found


@pytest.fixture(scope="module")
def place(shared_workplace: Path) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shared_workplace)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(DivergenceGuard, "on_train_batch_start", spoil)
        words = [*SMALL, *budget(STEPS, val_every=VAL_EVERY), "--trainer.logger.init_args.run_name=noisy"]
        assert main(["fit", *words]) == 0
        (recordings,) = shared_workplace.glob("runs/*/*/recordings")
        place = Place(shared_workplace, recordings.parent)
        patch.setattr(command, "_engine", lambda: place.engine)
        yield place


@pytest.fixture(scope="module")
def found(place: Place) -> dict[str, dict[str, Any]]:
    """Records of the arms, by kind of change."""
    skip = f"data.skip={json.dumps(sorted(NOISY))}"
    records = place.replay("--with", skip, "--with", "model.gradient.clip_norm=0.1")
    assert [each["arm"] for each in records[:3]] == ["unchanged", skip, "model.gradient.clip_norm=0.1"]
    return dict(zip(("unchanged", "skip", "clip", "frozen"), records, strict=True))


def test_the_unchanged_replay_is_the_run_to_the_bit(found: dict[str, dict[str, Any]]) -> None:
    unchanged = found["unchanged"]
    assert unchanged["is_proved"] and "is the run, bit for bit" in unchanged["sentence"]
    assert unchanged["step"] == PLANTED and unchanged["events"][0]["step"] == PLANTED
    assert [*unchanged["losses"]] == [str(step) for step in range(VAL_EVERY + 1, PLANTED + 5)]


def test_the_change_that_undoes_the_fault_prevents_it_and_another_does_not(found: dict[str, dict[str, Any]]) -> None:
    assert found["skip"]["verdict"] == "would have prevented it" and found["skip"]["spoilt_steps"] == 0
    assert found["clip"]["verdict"] == "would not have prevented it"
    assert "spike (total loss" in found["clip"]["sentence"]
    assert found["frozen"]["verdict"] == "would not have prevented it"  # routing has no part in it
    before = {
        name: [each["losses"][str(step)] for step in range(VAL_EVERY + 1, PLANTED)] for name, each in found.items()
    }
    assert before["skip"] == before["unchanged"] == before["frozen"] != before["clip"]


def test_arms_are_runs_of_their_own_and_are_not_repeated(place: Place, found: dict[str, dict[str, Any]]) -> None:
    started = len(place.engine.started)
    again = place.replay("--with", "model.gradient.clip_norm=0.1")
    assert [each["run_id"] for each in again] == [found[name]["run_id"] for name in ("unchanged", "clip", "frozen")]
    assert len(place.engine.started) == started
    rows = find_runs_anywhere("sqlite:///runs/mlflow.db", {"replays": place.run.name, "replay_step": str(PLANTED)})
    assert {row.run_id for row in rows} == {each["run_id"] for each in found.values()}
    by_id = {row.run_id: row for row in rows}
    clip = by_id[found["clip"]["run_id"]]
    assert clip.tags["arm"] == "model.gradient.clip_norm=0.1" and clip.tags["seed"] == "0"
    assert clip.params["trainer.max_steps"] == str(STEPS)  # the schedule is that of the run
    assert [*place.run.parent.glob("*/checkpoints")] == [place.run / "checkpoints"]


def test_the_picture_and_the_text_show_every_arm(
    place: Place, found: dict[str, dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    picture = Path(found["unchanged"]["picture"])
    assert (
        picture.parent == place.run.relative_to(place.folder) / "recordings"
        or picture.parent == place.run / "recordings"
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    (kept,) = place.folder.rglob(f"artifacts/**/{picture.name}")
    assert kept.read_bytes() == picture.read_bytes()
    capfd.readouterr()
    assert main(["replay", "noisy", "--with=model.gradient.clip_norm=0.1", "--steps=4"]) == 0
    shown = capfd.readouterr().out
    assert "bit for bit" in shown and "model.gradient.clip_norm=0.1 would not have prevented it" in shown
    assert f"Picture: {picture}" in shown


def test_a_run_that_was_tampered_with_is_not_proved(
    place: Place, found: dict[str, dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    from lightning_moevlm.tracking.recordings.recording import read_recording, write_recording

    (file,) = (place.run / "recordings").glob("*.safetensors")
    original = file.read_bytes()
    recording = read_recording(file)
    steps = [
        one._replace(values={**one.values, "loss/text": one.values["loss/text"] + 1e-6}) if one.step == PLANTED else one
        for one in recording.steps
    ]
    write_recording(recording._replace(steps=tuple(steps)), file)
    try:
        unchanged, *_ = place.replay("--frozen_routing=false", code=1)
    finally:
        file.write_bytes(original)
    assert not unchanged["is_proved"]
    assert f"first loss/text at step {PLANTED} differs" in unchanged["sentence"]


@pytest.mark.slow
def test_without_a_recording_the_logged_metrics_are_the_proof(place: Place, found: dict[str, dict[str, Any]]) -> None:
    """Slow because it replays once more."""
    (file,) = (place.run / "recordings").glob("*.safetensors")
    hidden = file.rename(file.with_suffix(".hidden"))
    try:
        unchanged, *_ = place.replay(f"--step={PLANTED}", "--frozen_routing=false")
    finally:
        hidden.rename(file)
    assert unchanged["is_proved"] and "(MLflow)" in unchanged["sentence"]


def test_the_kept_checkpoint_serves_when_others_are_gone(place: Place, found: dict[str, dict[str, Any]]) -> None:
    """`last.ckpt` is of the last step by now; the recorder has kept that of the validation before the burst."""
    kept = place.run / f"recordings/before_step{PLANTED:08d}.ckpt"
    assert int(torch.load(kept, weights_only=True)["global_step"]) == VAL_EVERY
    assert int(torch.load(place.run / "checkpoints/last.ckpt", weights_only=True)["global_step"]) == STEPS


def test_mistakes_are_refused_before_anything_is_written(
    place: Place, found: dict[str, dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    started, runs = len(place.engine.started), len(find_runs_anywhere("sqlite:///runs/mlflow.db"))
    for words, text in (
        (
            ["--step=20"],
            "has no checkpoint from before step 20 (its first is of step 30): give a later --step, or --from_start",
        ),
        (["--step=0"], "--step is 0"),
        (["--with=clip=1"], "write KEY=VALUE with a key of data, model or trainer"),
        (["--with=model.gradient.clip=1"], "model.gradient.clip"),
        (["--with=data.seed=x"], "data.seed"),
        (["--with=data.seed=1", "--with=data.seed=1"], "is given twice"),
        (["--steps=-1"], "--steps is -1"),
        (["--frozen_at=12"], f"--frozen_at is 12: give a step that is replayed up to the event, 31 to {PLANTED}"),
    ):
        assert main(["replay", "noisy", *words]) == 2
        assert text in capfd.readouterr().err.replace("\n", " ")
    assert main(["replay", "nosy"]) == 2
    assert "nosy" in capfd.readouterr().err
    assert len(place.engine.started) == started
    assert len(find_runs_anywhere("sqlite:///runs/mlflow.db")) == runs


@pytest.mark.slow
def test_changes_that_cannot_act_or_be_resumed_with_are_reported(
    place: Place, found: dict[str, dict[str, Any]]
) -> None:
    """Slow because it replays twice more."""
    _, refused, idle = place.replay(
        "--with=data.seed=7", "--with=data.max_pixels=999999", "--frozen_routing=false", code=1
    )
    assert idle["verdict"] == "changes nothing"
    assert refused["verdict"] == "cannot be replayed" and refused["run_id"] is None
    assert "seed was 0 in the checkpoint and is 7 now" in refused["sentence"]
