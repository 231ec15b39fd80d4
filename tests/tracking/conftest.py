import contextlib
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mlflow_server import MlflowServer


@pytest.fixture
def uri(migrated_database: Path, tmp_path: Path) -> str:
    """A store of the test's own, below a directory with a space and a letter outside of ASCII."""
    directory = tmp_path / "röhre 1"
    directory.mkdir()
    shutil.copyfile(migrated_database, directory / "mlflow.db")
    return f"sqlite:///{directory / 'mlflow.db'}"


@pytest.fixture
def unused_port() -> Iterator[int]:
    """A port of this machine on which nobody listens, and which no other program is given meanwhile."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def mlflow_server(migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real MLflow server on loopback, with a store of its own."""
    directory = tmp_path_factory.mktemp("server")
    shutil.copyfile(migrated_database, directory / "mlflow.db")
    server = MlflowServer(directory)
    server.start()
    yield server.address
    server.stop()


class Relay:
    """A door in front of a server that can be shut, connections included, and opened again.

    num_refused: connections that came while it was shut.
    """

    num_refused = 0

    def __init__(self, target: str) -> None:
        host, port = target.removeprefix("http://").split(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open = True
        self._answer: bytes | None = None
        self._sockets: list[socket.socket] = []
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def shut(self, answer: bytes | None = None) -> None:
        """Drop every connection, and every new one at once; or send new ones an answer, or nothing if that is empty."""
        self._open, self._answer = False, answer
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self._sockets.clear()

    def open(self) -> None:
        """Let everything pass again."""
        self._open = True

    def close(self) -> None:
        """End for good."""
        self.shut()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                inside, _ = self._listener.accept()
            except OSError:
                return
            if not self._open:
                self.num_refused += 1
                if self._answer:
                    inside.recv(65536)
                    inside.sendall(self._answer)
                if self._answer == b"":
                    self._sockets.append(inside)
                else:
                    inside.close()
                continue
            outside = socket.create_connection(self._target)
            self._sockets += [inside, outside]
            for source, sink in ((inside, outside), (outside, inside)):
                threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(65536):
                sink.sendall(chunk)
            sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def relay(mlflow_server: str) -> Iterator[Relay]:
    door = Relay(mlflow_server)
    yield door
    door.close()
