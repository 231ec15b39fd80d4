"""Params of a run: long, secret, changed by a resume."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from lightning_moevlm.tracking import RunLogger, find_runs
from lightning_moevlm.tracking.write.offline_log import find_offline_logs
from lightning_moevlm.tracking.write.run_params import LONGEST_VALUE
from tests.tracking.tiny import values


def test_resume_with_changed_params(uri: str) -> None:
    """Params are immutable: a resume with one changed value raised `Changing param values ...`."""
    first = RunLogger(tracking_uri=uri)
    first.log_hyperparams({"model": {"dim": 8, "top_k": 1}})
    first.log_metrics({"a": 1.0}, 0)
    first.finalize("failed")
    second = RunLogger(tracking_uri=uri, run_id=first.run_id, tags={"attempt": "2"})
    second.log_hyperparams({"model": {"dim": 8, "top_k": 2}, "trainer": {"max_steps": 5}})
    second.log_metrics({"a": 2.0}, 1)
    (run,) = find_runs(uri, "moevlm")
    assert run.status == "RUNNING"
    second.finalize("success")

    (run,) = find_runs(uri, "moevlm")
    assert run.status == "FINISHED"
    assert run.params == {"model.dim": "8", "model.top_k": "1", "trainer.max_steps": "5"}
    assert run.tags["changed_param/model.top_k"] == "2"
    assert run.tags["attempt"] == "2"
    assert "changed_param/model.dim" not in run.tags
    assert values(uri, run.run_id, "a") == [(0, 1.0), (1, 2.0)]


def test_long_params_are_whole(uri: str) -> None:
    """Lightning's logger cuts params at 250 characters."""
    logger = RunLogger(tracking_uri=uri)
    logger.log_hyperparams({"note": "x" * 4000, "vocabulary": "y" * 7000} | {f"p{i}": i for i in range(250)})
    logger.finalize()
    (run,) = find_runs(uri, "moevlm")
    assert run.params["note"] == "x" * 4000
    assert run.params["vocabulary"] == "y" * LONGEST_VALUE
    assert len(run.params) == 252
    artifact = MlflowClient(uri).download_artifacts(run.run_id, "params/vocabulary.txt")
    assert Path(artifact).read_text() == "y" * 7000


def test_secrets_are_masked_in_params(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUB_TOKEN", "tok-123456789")
    logger = RunLogger(tracking_uri=uri)
    logger.log_hyperparams({"hub": {"api_key": "k-1"}, "path": "s3://x?tok-123456789", "num_tokens": 7})
    assert "tok-123456789" not in "".join(log.journal.read_text() for log in find_offline_logs(logger.run_dir))
    logger.finalize()
    (run,) = find_runs(uri, "moevlm")
    assert run.params == {"hub.api_key": "***", "path": "s3://x?***", "num_tokens": "7"}
