import pytest
from mlflow import MlflowClient

from lightning_moevlm.tracking.write.metric_names import MetricNames, safe_name

CASES = {
    "train/task_loss": "train/task_loss",
    "recall@1": "recall_at_1",
    "load[3]": "load_3_",
    "/a//b/../c/": "a/b/c",
    "": "_",
    "..": "_",
    "größe (px)": "größe _px_",
}


@pytest.mark.parametrize(("name", "safe"), CASES.items())
def test_spelling(name: str, safe: str) -> None:
    assert safe_name(name) == safe


def test_mlflow_takes_every_one(uri: str) -> None:
    client = MlflowClient(uri)
    run_id = client.create_run("0").info.run_id
    for name in [*CASES, "x" * 400, "a:b", "%$&\\"]:
        client.log_metric(run_id, safe_name(name), 1.0)


def test_no_two_names_become_one() -> None:
    names = MetricNames()
    spelled = ["a@b", "a_at_b", "a[b", "a]b", "y" * 300, "y" * 301, "y" * 250]
    safe = [names.safe(name) for name in spelled]
    assert len(set(safe)) == len(spelled)
    assert safe[0] == "a_at_b"
    assert [names.safe(name) for name in spelled] == safe
    assert max(len(name) for name in safe) == 250
