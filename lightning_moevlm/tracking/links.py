"""Makes links into the MLflow UI that open on the right page.

MLflow's UI starts in its GenAI view (traces); `workflowType=machine_learning` shows runs and charts. The page is named
after the `#`, with a query of its own.
"""

import shlex
from urllib.parse import quote

from lightning_moevlm.common.secret_masking import mask_url_secrets
from lightning_moevlm.tracking.store import sqlite_path

_PORT = 5000
_WORKFLOW = "workflowType=machine_learning"


def server_command(uri: str) -> str | None:
    """Return the shell command that shows an SQLite store in a browser; None for a store that is a server."""
    if sqlite_path(uri) is None:
        return None
    words = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(_PORT), "--workers", "1"]
    return shlex.join([*words, "--backend-store-uri", uri])


def ui_address(uri: str) -> str:
    """Return where the UI of a store is: the server's own address, or loopback once `server_command` runs."""
    return f"http://127.0.0.1:{_PORT}" if sqlite_path(uri) is not None else mask_url_secrets(uri).rstrip("/")


def run_link(address: str, experiment_id: str, run_id: str) -> str:
    """Return the page of one run."""
    return f"{address}/?{_WORKFLOW}#/experiments/{experiment_id}/runs/{run_id}?{_WORKFLOW}"


def view_link(address: str, experiment_id: str, view: str) -> str:
    """Return the chart page of an experiment as a shared view shows it; view: the key of its tag."""
    page = f"{address}/?{_WORKFLOW}#/experiments/{experiment_id}/runs?{_WORKFLOW}&compareRunsMode=CHART"
    return f"{page}&viewStateShareKey={quote(view, safe='')}"
