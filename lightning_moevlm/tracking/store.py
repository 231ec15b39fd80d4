"""Opens the store of runs: an SQLite file by default, an MLflow server by choice.

MLflow's clients migrate a fresh SQLite file when they first open it; two at once fail with "table experiments already
exists". So the file is made once, under a lock, beside its place, and moved there when complete.
"""

import logging
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.secret_masking import mask_url_secrets
from lightning_moevlm.tracking.write.moved_store import follow_move

if TYPE_CHECKING:
    from mlflow import MlflowClient

DEFAULT_RUNS_DIR = Path("runs")
_DATABASE_NAME = "mlflow.db"
_SQLITE = "sqlite:///"
_LOCK_SECONDS = 300.0
_MIGRATION = re.compile(r"^(revision|down_revision) *= *(\"\w+\"|'\w+'|None) *(?:#.*)?$", re.MULTILINE)
_LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}  # seconds
_EXAMPLE = f"{_SQLITE}{DEFAULT_RUNS_DIR / _DATABASE_NAME}"
_ALLOWED = "allowed are sqlite:///PATH and http(s)://HOST:PORT"


def resolve_tracking_uri(uri: str | None) -> str:
    """Return the tracking URI in force: `uri`, else MLFLOW_TRACKING_URI as it is now, else SQLite in ./runs.

    Paths of SQLite files are made absolute, so that a later change of directory keeps the store.

    Raises:
        UserError: a file store, an in-memory database or a scheme that is neither SQLite nor HTTP.
    """
    chosen = uri or os.environ.get("MLFLOW_TRACKING_URI") or _EXAMPLE
    path = sqlite_path(chosen)
    if path is not None:
        return f"{_SQLITE}{path}"
    scheme = urlsplit(chosen).scheme
    if scheme in ("http", "https") and urlsplit(chosen).netloc:
        return chosen.rstrip("/")
    if scheme in ("", "file"):
        raise UserError(
            f"tracking URI {chosen!r} names a directory, and MLflow writes no file stores any more: "
            f"{_ALLOWED}; write {_EXAMPLE}, or move old runs with `mlflow migrate-filestore`"
        )
    raise UserError(
        f"tracking URI {mask_url_secrets(chosen)!r} has the scheme {scheme!r}: {_ALLOWED}; "
        "for another database start an MLflow server in front of it and give the server's address"
    )


def sqlite_path(uri: str) -> Path | None:
    """Return the absolute path of an SQLite URI's file, or None for a URI of another kind.

    Raises:
        UserError: an SQLite URI that names no file.
    """
    if not uri.startswith("sqlite:"):
        return None
    name = uri.removeprefix(_SQLITE)
    if name in (uri, "", ":memory:") or "?" in name:
        raise UserError(
            f"tracking URI {uri!r} names no SQLite file: write sqlite:///{DEFAULT_RUNS_DIR / _DATABASE_NAME}"
        )
    return Path(name).absolute()


def has_store(uri: str) -> bool:
    """Return whether there is a store to read: an SQLite file that is not empty, or the address of a server."""
    path = sqlite_path(uri)
    return path is None or (path.is_file() and path.stat().st_size > 0)


def runs_dir(uri: str) -> Path:
    """Return the absolute directory for checkpoints and artifacts: the SQLite file's, else ./runs."""
    path = sqlite_path(uri)
    return path.parent if path is not None else DEFAULT_RUNS_DIR.absolute()


def prepare_store(uri: str) -> None:
    """Create the SQLite file if there is none, or check that the server answers.

    Several processes may call it at once. A database that exists costs two queries; one that was moved with its folder
    finds its artifacts there.

    Args:
        uri: as `resolve_tracking_uri` returns it.

    Raises:
        UserError: the server does not answer within seconds; the file is not an MLflow database, or belongs to
            another version of it.
    """
    # It announces migrations, and writes the traceback of every error that it raises as well.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    path = sqlite_path(uri)
    if path is None:
        _ask_server(uri)
        return
    if _revision(path) is None:
        _create(path)
    _check_revision(path)
    try:
        follow_move(path)
    except sqlite3.Error as error:
        raise UserError(
            f"{path} cannot be written ({error}): free disk space or grant write permission, then repeat the command"
        ) from error


def open_client(uri: str) -> "MlflowClient":
    """Return MLflow's client of a store; its import takes a second, so commands that need none do not wait for it."""
    from mlflow import MlflowClient

    return MlflowClient(uri)


@contextmanager
def limit_request_time() -> Iterator[None]:
    """Have MLflow's HTTP client give up after seconds within, instead of minutes of retries.

    MLflow reads the limits from the process's environment. Within itself it changes nothing, so that other threads may
    use it while the first one does.
    """
    if all(os.environ.get(name) == value for name, value in _LIMITS.items()):
        yield
        return
    before = {name: os.environ.get(name) for name in _LIMITS}
    os.environ.update(_LIMITS)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def describe_cause(error: BaseException) -> str:
    """Return the first cause of a store's error in one line, credentials masked."""
    while (deeper := error.__cause__ or error.__context__) is not None:
        error = deeper
    lines = str(error).splitlines() or [type(error).__name__]
    return mask_url_secrets(lines[0])[:200]


def _create(path: Path) -> None:
    from filelock import FileLock, Timeout
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    lock = FileLock(path.with_name(f"{path.name}.lock"), timeout=_LOCK_SECONDS)
    beside = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock:
            if _revision(path) is None:
                shutil.rmtree(beside, ignore_errors=True)  # what a killed process left; we hold the lock
                beside.mkdir()
                unfinished = beside / f"{time.time_ns()}.db"  # MLflow keeps an engine for every address it has met
                try:
                    _migrate(unfinished, path.parent / "artifacts")
                    unfinished.replace(path)
                finally:
                    shutil.rmtree(beside, ignore_errors=True)
    except Timeout as error:
        raise UserError(
            f"another process has been creating {path} for {_LOCK_SECONDS:.0f} s: end it, then repeat the command"
        ) from error
    except (OSError, SQLAlchemyError, MlflowException) as error:
        reason = getattr(error, "strerror", None) or describe_cause(error)
        raise UserError(
            f"tracking database {path} cannot be created ({reason}): free disk space, or name a file in a writable "
            "folder in tracking_uri or MLFLOW_TRACKING_URI"
        ) from error


def _migrate(path: Path, artifacts: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    alembic = logging.getLogger("alembic")  # it announces every revision
    level = alembic.level
    alembic.setLevel(logging.WARNING)
    try:
        SqlAlchemyStore(f"{_SQLITE}{path}", artifacts.as_uri()).engine.dispose()
    finally:
        alembic.setLevel(level)


def _revision(path: Path) -> str | None:
    """Return the schema revision of a database, None where there is no file or an empty one."""
    if not path.exists() or path.stat().st_size == 0:
        return None
    try:
        # not read-only: the next process that opens the file rolls back what a killed writer left half done
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=20)) as connection:
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path} is not an MLflow database ({error}): name another file in the tracking URI") from error
    if row is None:
        raise UserError(
            f"{path} has no MLflow schema version, so it may be incomplete: rename it and repeat the command"
        )
    return str(row[0])


def _check_revision(path: Path) -> None:
    import mlflow
    from mlflow.store import db_migrations

    found = _revision(path)
    if _newest_by_text(Path(db_migrations.__path__[0]) / "versions") == found:
        return
    from alembic.script import ScriptDirectory

    needed = ScriptDirectory(str(Path(db_migrations.__path__[0]))).get_current_head()
    if found != needed:
        raise UserError(
            f"{path} has the schema {found}, MLflow {mlflow.__version__} needs {needed}: "
            f"stop all that writes to it, copy it, then run `mlflow db upgrade {_SQLITE}{path}`"
        )


def _newest_by_text(migrations: Path) -> str | None:
    """Return the revision that no migration builds on, from the files' text; None where that does not say.

    Alembic runs every file for this, half a second at the start of every run, so it is asked only to refuse.
    """
    revisions: set[str] = set()
    below: set[str] = set()
    for file in migrations.glob("[!_]*.py"):
        found = dict(_MIGRATION.findall(file.read_text(encoding="utf-8")))
        if found.keys() != {"revision", "down_revision"}:
            return None
        revisions.add(found["revision"].strip("\"'"))
        below.add(found["down_revision"].strip("\"'"))
    newest = revisions - below
    return newest.pop() if len(newest) == 1 else None


def _ask_server(uri: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        with limit_request_time():
            open_client(uri).search_experiments(max_results=1)
    except MlflowException as error:
        port = urlsplit(uri).port or 5000
        raise UserError(
            f"tracking URI {mask_url_secrets(uri)} does not answer as an MLflow server ({describe_cause(error)}): "
            f"start one, `mlflow server --host 127.0.0.1 --port {port} --backend-store-uri {_EXAMPLE}`, "
            "or unset tracking_uri and MLFLOW_TRACKING_URI to use SQLite"
        ) from error
