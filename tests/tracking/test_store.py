import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory
from mlflow.store import db_migrations

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.tracking import prepare_store, resolve_tracking_uri
from lightning_moevlm.tracking.store import _newest_by_text, limit_request_time, runs_dir, sqlite_path
from tests.tracking.tiny import short_files

_OPEN_AND_LOG = """
import sys, time
from lightning_moevlm.tracking.store import prepare_store
import mlflow.store.tracking.sqlalchemy_store  # the slow part, before the start signal
print("ready", flush=True)
sys.stdin.readline()
prepare_store(sys.argv[1])
from mlflow import MlflowClient
client = MlflowClient(sys.argv[1])
client.log_metric(client.create_run("0").info.run_id, "a", 1.0)
"""


def test_explicit_before_environment_before_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_tracking_uri(None) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000/")
    assert resolve_tracking_uri(None) == "http://127.0.0.1:5000"
    assert resolve_tracking_uri("sqlite:///other.db") == f"sqlite:///{tmp_path}/other.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert resolve_tracking_uri(None) == f"sqlite:///{tmp_path}/runs/mlflow.db"


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns", "mlruns"])
def test_file_stores_are_refused(uri: str) -> None:
    """MLflow >= 3.13 refuses them at the first write, with a page of text."""
    with pytest.raises(UserError, match=r"sqlite:///runs/mlflow\.db.*migrate-filestore"):
        resolve_tracking_uri(uri)


@pytest.mark.parametrize(
    "uri", ["postgresql://me:pw@host/db", "databricks://x", "htp://host", "sqlite://", "sqlite:///"]
)
def test_other_schemes_are_refused_without_their_passwords(uri: str) -> None:
    with pytest.raises(UserError, match="tracking URI") as refusal:
        resolve_tracking_uri(uri)
    assert "pw" not in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_paths(tmp_path: Path) -> None:
    assert sqlite_path("http://127.0.0.1:5000") is None
    assert sqlite_path(f"sqlite:///{tmp_path}/a.db") == tmp_path / "a.db"
    assert runs_dir(f"sqlite:///{tmp_path}/a.db") == tmp_path
    assert runs_dir("http://127.0.0.1:5000") == Path.cwd() / "runs"


@pytest.mark.slow
def test_three_processes_on_a_fresh_database(tmp_path: Path) -> None:
    """Unlocked, MLflow's clients fail here with `table experiments already exists`, in 3 of 3 trials."""
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", _OPEN_AND_LOG, uri],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:  # only now, so that they really start together
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    errors = [child.communicate(timeout=120)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], "\n".join(errors)
    with sqlite3.connect(tmp_path / "runs" / "mlflow.db") as connection:
        assert connection.execute("SELECT count(*) FROM metrics").fetchone() == (3,)
        assert connection.execute("SELECT count(*) FROM experiments").fetchone() == (1,)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["mlflow.db", "mlflow.db.lock"]


def test_what_a_killed_process_left_is_no_obstacle(tmp_path: Path, migrated_database: Path) -> None:
    half_made = tmp_path / ".mlflow.db.new"
    half_made.mkdir()
    (half_made / "1.db").write_bytes(migrated_database.read_bytes()[:4096])
    (tmp_path / "mlflow.db").touch()
    prepare_store(f"sqlite:///{tmp_path}/mlflow.db")
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        assert connection.execute("SELECT count(*) FROM experiments").fetchone() == (1,)
    assert not half_made.exists()


def test_a_prepared_database_costs_nothing(uri: str) -> None:
    prepare_store(uri)
    before = Path(uri.removeprefix("sqlite:///")).stat()
    start = time.process_time()
    prepare_store(uri)
    assert time.process_time() - start < 0.5  # creating one takes seconds
    after = Path(uri.removeprefix("sqlite:///")).stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)


def test_another_schema_is_told_and_left_alone(uri: str) -> None:
    path = Path(uri.removeprefix("sqlite:///"))
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0000abcd'")
    content = path.read_bytes()
    with pytest.raises(UserError, match=r"schema 0000abcd.*mlflow db upgrade sqlite:///"):
        prepare_store(uri)
    assert path.read_bytes() == content


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database, and longer than the header of one " * 10)
    with pytest.raises(UserError, match="not an MLflow database"):
        prepare_store(f"sqlite:///{path}")
    with sqlite3.connect(tmp_path / "other.db") as connection:
        connection.execute("CREATE TABLE mine (x)")
    with pytest.raises(UserError, match="not an MLflow database"):
        prepare_store(f"sqlite:///{tmp_path}/other.db")


def test_a_uri_that_does_not_answer(unused_port: int) -> None:
    start = time.perf_counter()
    with pytest.raises(UserError) as refusal:
        prepare_store(f"http://user:pw@127.0.0.1:{unused_port}")
    assert time.perf_counter() - start < 60  # MLflow by itself retries for minutes
    message = str(refusal.value)
    assert f"127.0.0.1:{unused_port} does not answer" in message
    assert f"mlflow server --host 127.0.0.1 --port {unused_port}" in message
    assert "pw" not in message
    assert "\n" not in message


def test_something_else_answers() -> None:
    class Teapot(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(418)

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Teapot)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with pytest.raises(UserError, match="does not answer as an MLflow server"):
            prepare_store(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_impatience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    with pytest.raises(RuntimeError), limit_request_time():
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
        raise RuntimeError
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


@pytest.mark.parametrize(("before", "after"), [(None, "true"), ("false", "false")])
def test_telemetry_is_off_unless_the_user_says_otherwise(before: str | None, after: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_DISABLE_TELEMETRY"}
    if before is not None:
        environment["MLFLOW_DISABLE_TELEMETRY"] = before
    code = "import os, lightning_moevlm.tracking; print(os.environ['MLFLOW_DISABLE_TELEMETRY'])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == after


def test_reading_needs_neither_lightning_nor_torch() -> None:
    code = "import sys, lightning_moevlm.tracking; print({'lightning', 'torch', 'mlflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("a file where a folder is needed")
    with pytest.raises(UserError, match=r"notes.txt/runs/mlflow.db cannot be created \(Not a directory\)"):
        prepare_store(f"sqlite:///{tmp_path}/notes.txt/runs/mlflow.db")


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        short_files(60_000),
        pytest.raises(UserError, match=r"runs/mlflow.db cannot be created \(.*\): free disk space, or"),
    ):
        prepare_store(f"sqlite:///{tmp_path}/runs/mlflow.db")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mlflow.db.lock"]
    prepare_store(f"sqlite:///{tmp_path}/runs/mlflow.db")


def test_what_a_killed_writer_left_is_rolled_back(migrated_database: Path, tmp_path: Path) -> None:
    # a transaction that has spilled to the file and was never committed: database and journal as SIGKILL leaves them
    written, killed = tmp_path / "written.db", tmp_path / "killed.db"
    shutil.copyfile(migrated_database, written)
    with closing(sqlite3.connect(written, isolation_level=None)) as writer:
        writer.execute("PRAGMA cache_size = 1")
        writer.execute("BEGIN")
        for number in range(200):
            row = (f"experiment {number}", "x" * 5000)
            writer.execute("INSERT INTO experiments (name, artifact_location) VALUES (?, ?)", row)
        shutil.copyfile(written, killed)
        shutil.copyfile(f"{written}-journal", f"{killed}-journal")
    prepare_store(f"sqlite:///{killed}")
    with closing(sqlite3.connect(killed)) as reader:
        assert reader.execute("SELECT count(*) FROM experiments WHERE name LIKE 'experiment %'").fetchone() == (0,)


def test_the_newest_revision_is_read_off_the_migrations_or_left_to_alembic(tmp_path: Path) -> None:
    shipped = Path(db_migrations.__path__[0])
    assert _newest_by_text(shipped / "versions") == ScriptDirectory(str(shipped)).get_current_head()
    (tmp_path / "a.py").write_text('revision = "a1"\ndown_revision = None\n')
    (tmp_path / "b.py").write_text("revision = 'b2'\ndown_revision = 'a1'  # why\n")
    assert _newest_by_text(tmp_path) == "b2"
    (tmp_path / "c.py").write_text('revision: str = "c3"\ndown_revision = "b2"\n')
    assert _newest_by_text(tmp_path) is None
