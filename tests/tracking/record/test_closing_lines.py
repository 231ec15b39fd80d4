from pathlib import Path

import pytest

from lightning_moevlm.tracking.record.closing_lines import closing_lines


def test_four_lines_for_a_file_three_for_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    local = closing_lines("sqlite:////home/me/runs/mlflow.db", "1", "ab", Path("/home/me/my runs/1/ab"))
    assert [line.split(":")[0] for line in local[:2]] == ["Checkpoints and configuration", "MLflow"]
    assert local[1].endswith("--backend-store-uri sqlite:////home/me/runs/mlflow.db")
    assert local[2].startswith("        http://127.0.0.1:5000/") and "runs/ab" in local[2]
    # in a store that only its configuration names, a run is found by its folder
    assert local[3].endswith("moevlm test --run '/home/me/my runs/1/ab', moevlm fit --run '/home/me/my runs/1/ab'")
    remote = closing_lines("https://me:secret@host", "1", "ab", Path("/home/me/runs/1/ab"))
    assert len(remote) == 3
    assert remote[1].startswith("MLflow: https://***@host/")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@host")
    again = closing_lines("https://me:secret@host", "1", "0123456789abcdef", Path("/home/me/runs/1/ab"))[2]
    assert again == "Evaluate or resume: moevlm test --run 01234567, moevlm fit --run 01234567"
