"""One of several ranks reports a mistake; the others exit with the same code and print nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.configuration.report_once import report_once
from tests.small_run import SMALL, budget

MARK = "MOEVLM_MISTAKE_MARK"


def started_by_another(patch: pytest.MonkeyPatch, mark: Path) -> None:
    """Make this process one that rank 0 has started."""
    patch.setenv(MARK, str(mark))


def test_one_process_reports_its_mistakes_and_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(UserError), report_once(folder):
            raise UserError("wrong")
    assert MARK not in os.environ
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(RuntimeError, match="a bug"), report_once(tmp_path):
        raise RuntimeError("a bug")


def test_the_second_to_find_a_mistake_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started_by_another(monkeypatch, tmp_path / "told")
    with pytest.raises(UserError), report_once(tmp_path / "unused"):
        raise UserError("wrong")
    with pytest.raises(SystemExit) as ended, report_once(tmp_path / "unused"):
        raise UserError("wrong")
    assert ended.value.code == 2
    with pytest.raises(SystemExit) as lost, report_once(tmp_path / "unused"):
        raise RuntimeError("Connection closed by peer")
    assert lost.value.code == 2


def test_a_rank_whose_first_rank_is_gone_has_nothing_to_add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started_by_another(monkeypatch, tmp_path / "gone" / "told")
    for error in (UserError("wrong"), RuntimeError("Connection closed by peer")):
        with pytest.raises(SystemExit), report_once(tmp_path):
            raise error


def test_a_bug_on_one_of_many_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_moevlm.configuration.report_once._PATIENCE_S", 0.2)
    started_by_another(monkeypatch, tmp_path / "told")
    with pytest.raises(RuntimeError, match="a bug"), report_once(tmp_path):
        raise RuntimeError("a bug")


def test_one_of_the_ranks_of_a_launcher_reports(tmp_path: Path) -> None:
    """torchrun and srun start ranks that know nothing of each other but their parent, here this process."""
    program = (
        "import pathlib\n"
        "from lightning_moevlm.common.errors import UserError\n"
        "from lightning_moevlm.configuration.report_once import report_once\n"
        "try:\n"
        f"    with report_once(pathlib.Path({str(tmp_path)!r})):\n"
        "        raise UserError('wrong')\n"
        "except UserError as error:\n"
        "    print(error)\n"
        "    raise SystemExit(2)\n"
    )
    for variable in ("RANK", "SLURM_PROCID"):
        folder = tmp_path / variable
        folder.mkdir()
        for _command in range(2):  # of one shell: the second reports too
            ranks = [
                subprocess.Popen(
                    [sys.executable, "-c", program],
                    env=os.environ | {variable: str(rank), "TMPDIR": str(folder)},
                    stdout=subprocess.PIPE,
                    text=True,
                )
                for rank in range(3)
            ]
            assert [rank.communicate(timeout=60)[0] for rank in ranks] == ["wrong\n", "", ""]
            assert [rank.returncode for rank in ranks] == [2, 2, 2]


def test_a_rank_that_alone_finds_a_mistake_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_moevlm.configuration.report_once._PATIENCE_S", 0.2)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="wrong"), report_once(tmp_path):
        raise UserError("wrong")


@pytest.mark.slow  # two processes each
@pytest.mark.parametrize(
    "mistake",
    ["--data.batch_size=3000", "--trainer.logger.init_args.tracking_uri=http://127.0.0.1:9"],
    ids=["that every rank finds", "that rank 0 finds"],
)
def test_a_mistake_on_two_ranks_ends_in_one_line(mistake: str, workplace: Path) -> None:
    words = ("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp", mistake)
    command = [sys.executable, "-m", "lightning_moevlm", "fit", *SMALL, *budget(2), *words]
    done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len([line for line in lines if line.startswith("moevlm: error:")]) == 1
    assert not any("Traceback" in line or ("gloo" in line and "File" in line) for line in lines)
