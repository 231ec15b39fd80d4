"""A real MLflow server on loopback that can be killed in the middle and started again on the same database."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import requests


class MlflowServer:
    """directory: holds mlflow.db, migrated, and gets the artifacts and the log. The port stays over restarts."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._port = _free_port()
        self._has_answered = False
        self.database = f"sqlite:///{directory / 'mlflow.db'}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Where it answers, from the first start on."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start, and return once it answers."""
        for _ in range(3):
            if self._answers():
                self._has_answered = True
                return
            if not self._has_answered:  # another program was given the port between the look and the start
                self._port = _free_port()
        raise AssertionError((self._directory / "log").read_text())

    def _answers(self) -> bool:
        """Start a server; return False where its port is another's."""
        command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        command += ["--backend-store-uri", self.database, "--artifacts-destination", str(self._directory / "files")]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self._directory / "log").open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=self._directory,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        for _ in range(1200):
            try:
                if requests.get(f"{self.address}/health", timeout=5).ok:
                    return True
            except requests.RequestException:
                if self._process.poll() is not None:
                    told = (self._directory / "log").read_text()
                    assert "ddress already in use" in told, told
                    return False
                time.sleep(0.1)
        raise AssertionError(f"no answer: {(self._directory / 'log').read_text()}")

    def kill(self) -> None:
        """SIGKILL, as the system's memory guard would."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it for good; nothing where it has ended."""
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, number)  # its own session: the server and its workers, nobody else
            self._process.wait(timeout=30)
            self._process = None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
