import shlex

from lightning_moevlm.tracking import run_link, server_command, view_link
from lightning_moevlm.tracking.links import ui_address


def test_links_open_the_machine_learning_view() -> None:
    assert run_link("http://127.0.0.1:5000", "3", "ab12") == (
        "http://127.0.0.1:5000/?workflowType=machine_learning#/experiments/3/runs/ab12?workflowType=machine_learning"
    )
    assert view_link("http://h", "3", "a b") == (
        "http://h/?workflowType=machine_learning"
        "#/experiments/3/runs?workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey=a%20b"
    )


def test_addresses() -> None:
    assert ui_address("sqlite:////runs/mlflow.db") == "http://127.0.0.1:5000"
    assert ui_address("https://me:pw@host/mlflow/") == "https://***@host/mlflow"


def test_server_command_survives_a_shell() -> None:
    command = server_command("sqlite:////my runs/mlflow.db")
    assert command is not None
    words = shlex.split(command)
    assert words[:6] == ["mlflow", "server", "--host", "127.0.0.1", "--port", "5000"]
    assert words[-2:] == ["--backend-store-uri", "sqlite:////my runs/mlflow.db"]
    assert server_command("http://127.0.0.1:5000") is None
