import shlex
from pathlib import Path

from lightning_moevlm.tracking.last_words import command_to_go_on, where_everything_is


def test_three_lines_for_a_file_two_for_a_server() -> None:
    local = where_everything_is("sqlite:////home/me/runs/mlflow.db", "1", "ab", Path("/home/me/runs/1/ab"))
    assert [line.split(":")[0] for line in local[:2]] == ["Checkpoints and configuration", "MLflow"]
    assert local[1].endswith("--backend-store-uri sqlite:////home/me/runs/mlflow.db")
    assert local[2].startswith("        http://127.0.0.1:5000/") and "runs/ab" in local[2]
    remote = where_everything_is("https://me:secret@host", "1", "ab", Path("/home/me/runs/1/ab"))
    assert len(remote) == 2
    assert remote[1].startswith("MLflow: https://***@host/")


def test_options_of_an_earlier_resume_are_replaced() -> None:
    argv = ["moevlm", "fit", "-c", "my conf.yaml", "--ckpt_path", "old.ckpt", "--model.seed=1"]
    argv.append("--trainer.logger.init_args.run_id=old")
    wanted = ["moevlm", "fit", "-c", "my conf.yaml", "--model.seed=1", "--ckpt_path", "runs/new.ckpt"]
    assert shlex.split(command_to_go_on(argv, Path("runs/new.ckpt"), None)) == [
        *wanted[:5],
        "--trainer.logger.init_args.run_id=old",
        *wanted[5:],
    ]
    wanted += ["--trainer.logger.init_args.run_id", "new"]
    assert shlex.split(command_to_go_on(argv, Path("runs/new.ckpt"), "new")) == wanted
