import shlex
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from mlflow import MlflowClient

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.tracking import RunLogger, RunRow, find_runs, metric_history
from lightning_moevlm.tracking.record.run_record import RunRecord
from tests.tracking.tiny import TinyData, TinyModule


class Scaled(TinyModule):
    """With arguments of its own, for configurations."""

    def __init__(self, scale: float = 1.0, fail_at: int | None = None) -> None:
        super().__init__(scale, fail_at)


class Command:
    """The command line as the package builds it, with a module and data of the test's."""

    def __init__(self, uri: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.uri, self.directory = uri, directory
        monkeypatch.setattr(sys, "argv", ["moevlm"])
        monkeypatch.chdir(directory)

    def __call__(self, *words: str) -> LightningCLI:
        settings = {"parser_mode": "omegaconf+"}
        return LightningCLI(
            Scaled,
            TinyData,
            save_config_callback=RunRecord,
            save_config_kwargs={"argv": ["moevlm", *words]},
            seed_everything_default=0,
            parser_kwargs={**settings, **dict.fromkeys(("fit", "validate", "test", "predict"), settings)},
            auto_configure_optimizers=False,
            args=list(words),
        )

    def base(self, **trainer: object) -> Path:
        path = self.directory / "base.yaml"
        logger = {
            "class_path": "lightning_moevlm.tracking.write.run_logger.RunLogger",
            "init_args": {"tracking_uri": self.uri, "experiment_name": "record"},
        }
        settings = {
            "logger": logger, "max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False,
            "enable_model_summary": False, "log_every_n_steps": 1, **trainer,
        }  # fmt: skip
        path.write_text("# the base\n" + yaml.safe_dump({"trainer": settings, "model": {"scale": 2.0}}))
        return path

    def run(self) -> RunRow:
        (found,) = find_runs(self.uri, "record")
        return found

    def artifact(self, name: str) -> str:
        return Path(MlflowClient(self.uri).download_artifacts(self.run().run_id, name)).read_text(encoding="utf-8")


@pytest.fixture
def command(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(uri, tmp_path, monkeypatch)


def test_a_fit_is_recorded_lightning_19441(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning #19441, #20273: SaveConfigCallback asserts `trainer.log_dir`; Lightning's logger has none."""
    base = command.base()
    override = command.directory / "arm.yaml"
    override.write_text("model:\n  scale: 3.0\n")
    command("fit", "-c", str(base), "-c", str(override), "--trainer.max_steps=3")

    run = command.run()
    assert run.status == "FINISHED"
    resolved = yaml.safe_load(command.artifact("config/config.yaml"))
    assert (resolved["model"]["scale"], resolved["trainer"]["max_steps"]) == (3.0, 3)
    assert command.artifact("config/source0_base.yaml") == base.read_text()
    assert command.artifact("config/source1_arm.yaml") == override.read_text()
    assert shlex.split(command.artifact("config/command.txt"))[:4] == ["moevlm", "fit", "-c", str(base)]
    changed = yaml.safe_load(command.artifact("config/changed.yaml"))
    assert changed == {
        "model.scale": {"base": "2.0", "now": "3.0"},
        "trainer.max_steps": {"base": "2", "now": "3"},
    }
    assert (run.params["model.scale"], run.params["trainer.max_steps"]) == ("3.0", "3")
    assert run.params["trainer.logger.init_args.experiment_name"] == "record"
    assert run.tags["version/torch"] == torch.__version__
    assert {
        "version/python",
        "version/lightning",
        "version/mlflow",
        "version/lightning_moevlm",
    } <= run.tags.keys()
    assert ("commit" in run.tags) == ("commit_dirty" in run.tags)

    run_dir = Path(command.uri.removeprefix("sqlite:///")).parent / run.experiment_id / run.run_id
    assert (run_dir / "config" / "config.yaml").read_text() == command.artifact("config/config.yaml")
    assert list((run_dir / "checkpoints").glob("*.ckpt"))
    where, server, link, again = capsys.readouterr().out.splitlines()[-4:]
    assert where == f"Checkpoints and configuration: {run_dir}"
    assert server.startswith("MLflow: mlflow server --host 127.0.0.1 --port 5000")
    assert link.startswith(" ") and f"#/experiments/{run.experiment_id}/runs/{run.run_id}" in link
    assert again == f"Evaluate or resume: moevlm test --run '{run_dir}', moevlm fit --run '{run_dir}'"


def test_the_recorded_config_repeats_the_run(command: Command) -> None:
    command("fit", "-c", str(command.base()), "--model.scale=5.0")
    first = command.run()
    recorded = command.directory / "recorded.yaml"
    recorded.write_text(command.artifact("config/config.yaml"))
    command("fit", "-c", str(recorded))
    runs = find_runs(command.uri, "record")
    assert len(runs) == 2
    histories = [metric_history(command.uri, run.run_id, ["train/task_loss"]) for run in runs]
    assert [p.value for p in histories[0]] == [p.value for p in histories[1]]
    assert runs[1].params == first.params


def test_the_data_is_an_input(command: Command) -> None:
    command("fit", "-c", str(command.base()))
    (entry,) = MlflowClient(command.uri).get_run(command.run().run_id).inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("tiny-set", ("5f" * 32)[:36])
    assert [(tag.key, tag.value) for tag in entry.tags] == [("mlflow.data.context", "train")]
    assert command.run().tags["manifest_digest"] == "5f" * 32


def test_a_resume_adds_its_config_and_overwrites_none(command: Command) -> None:
    """Lightning's callback refuses to start where a config.yaml lies; params of a run are immutable."""
    base = command.base()
    with pytest.raises(RuntimeError, match="the step failed"):
        command("fit", "-c", str(base), "--model.fail_at=1")
    first = command.run()
    assert first.status == "FAILED"
    before = command.artifact("config/config.yaml")
    command("fit", "-c", str(base), f"--trainer.logger.init_args.run_id={first.run_id}", "--trainer.max_steps=4")

    run = command.run()
    assert run.status == "FINISHED"
    assert command.artifact("config/config.yaml") == before
    assert yaml.safe_load(command.artifact("config.1/config.yaml"))["trainer"]["max_steps"] == 4
    assert (run.params["trainer.max_steps"], run.tags["changed_param/trainer.max_steps"]) == ("2", "4")
    assert run.params["model.fail_at"] == "1"
    assert run.tags["changed_param/model.fail_at"] == "null"


def test_secrets_stay_out(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """`${oc.env:...}` is written out resolved by Lightning's callback."""
    monkeypatch.setenv("DATA_PASSWORD", "hunter2-hunter2")
    base = command.base()
    base.write_text(base.read_text() + "data:\n  api_key: ${oc.env:DATA_PASSWORD}\n")
    command("fit", "-c", str(base))
    command_line = ["fit", "-c", str(base), "--data.api_key", "sk-other"]
    command(*command_line)
    everything = ""
    for run in find_runs(command.uri, "record"):
        everything += f"{run.params} {run.tags}"
        folder = Path(MlflowClient(command.uri).download_artifacts(run.run_id, "config"))
        everything += "".join(path.read_text() for path in folder.iterdir())
    assert "hunter2" not in everything
    assert "sk-other" not in everything
    assert "${oc.env:DATA_PASSWORD}" in everything
    assert "--data.api_key '***'" in everything


def test_system_metrics_are_sampled_and_stop(command: Command) -> None:
    command("fit", "-c", str(command.base()))
    assert {
        "system/cpu_utilization_percentage",
        "system/system_memory_usage_megabytes",
    } <= command.run().last.keys()
    with pytest.raises(RuntimeError, match="the step failed"):
        command("fit", "-c", str(command.base()), "--model.fail_at=1")
    assert "SystemSampler" not in [thread.name for thread in threading.enumerate()]


def test_fast_dev_run_touches_nothing(command: Command) -> None:
    database = Path(command.uri.removeprefix("sqlite:///"))
    before = database.read_bytes()
    command("fit", "-c", str(command.base()), "--trainer.fast_dev_run=true")
    assert database.read_bytes() == before
    assert sorted(path.name for path in database.parent.iterdir()) == ["mlflow.db"]


def test_without_a_logger(command: Command) -> None:
    command("fit", "-c", str(command.base(logger=False, enable_checkpointing=False)))
    assert not (command.directory / "config").exists()


def test_with_another_logger(command: Command) -> None:
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "logs"}}
    cli = command("fit", "-c", str(command.base(logger=logger)))
    assert isinstance(cli.trainer.logger, CSVLogger)
    assert (Path(cli.trainer.logger.log_dir) / "config" / "config.yaml").is_file()


def test_a_base_that_is_not_complete_alone(command: Command) -> None:
    base = command.base()
    base.write_text(base.read_text().replace("scale: 2.0", "scale: ${vars.scale}"))
    values = command.directory / "values.yaml"
    values.write_text("model:\n  scale: 3.0\n")
    command("fit", "-c", str(base), "-c", str(values))
    text = command.artifact("config/changed.yaml")
    assert text.startswith("# against the defaults: base.yaml is not complete alone")
    assert yaml.safe_load(text)["model.scale"] == {"base": "1.0", "now": "3.0"}


def test_other_ranks_write_nothing(tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On rank 1 Lightning hands out a dummy experiment; nothing of ours may open the store there."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = RunLogger(tracking_uri=uri)
    logger.log_metrics({"a": 1.0}, 0)
    logger.log_hyperparams({"a": 1})
    logger.log_artifact_text("a", "b")
    logger.finalize("success")
    assert logger.run_id is None
    assert logger.save_dir
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    assert find_runs(uri, "moevlm") == []


def test_a_silent_server_ends_the_command_with_one_line(command: Command, unused_port: int) -> None:
    command.uri = f"http://127.0.0.1:{unused_port}"
    with pytest.raises(UserError, match="does not answer"):
        command("fit", "-c", str(command.base()))
    assert sorted(path.name for path in command.directory.iterdir()) == ["base.yaml", "röhre 1"]
