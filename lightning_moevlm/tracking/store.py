"""Where runs are kept: an SQLite file by default, an MLflow server by choice, and nothing else.

MLflow's clients migrate a fresh SQLite file when they first open it, each for itself: two at once fail with
"table experiments already exists". So the file is made once, under a lock, beside its place, and moved there
when complete.
"""

import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.secret_masking import mask_url_secrets
from lightning_moevlm.tracking.write.moved_store import follow_move

DEFAULT_RUNS_DIR = Path("runs")
_DATABASE_NAME = "mlflow.db"
_SQLITE = "sqlite:///"
_LOCK_SECONDS = 300.0
_MIGRATION = re.compile(r"^(revision|down_revision) *= *(\"\w+\"|'\w+'|None) *(?:#.*)?$", re.MULTILINE)
_ANSWER_SECONDS = "5"
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


def runs_dir(uri: str) -> Path:
    """Return the absolute directory for checkpoints and artifacts: the SQLite file's, else ./runs."""
    path = sqlite_path(uri)
    return path.parent if path is not None else DEFAULT_RUNS_DIR.absolute()


def prepare_store(uri: str) -> None:
    """Make the store ready: create the SQLite file if there is none, or ask the server for an answer.

    Safe when several processes call it at once. On a database that exists it costs two queries. One that was moved
    with its folder finds its artifacts there.

    Args:
        uri: as `resolve_tracking_uri` returns it.

    Raises:
        UserError: the server does not answer within seconds; the file is not an MLflow database, or belongs to
            another version of it.
    """
    path = sqlite_path(uri)
    if path is None:
        _ask_server(uri)
        return
    if _revision(path) is None:
        _create(path)
    _check_revision(path)
    follow_move(path)


@contextmanager
def limit_request_time() -> Iterator[None]:
    """Within, MLflow's HTTP client gives up after seconds instead of minutes of retries."""
    patience = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": _ANSWER_SECONDS}
    before = {name: os.environ.get(name) for name in patience}
    os.environ.update(patience)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def describe_cause(error: BaseException) -> str:
    """Return one line about what was at the bottom of a store's error, credentials masked."""
    while (deeper := error.__cause__ or error.__context__) is not None:
        error = deeper
    lines = str(error).splitlines() or [type(error).__name__]
    return mask_url_secrets(lines[0])[:200]


def _create(path: Path) -> None:
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_name(f"{path.name}.lock"), timeout=_LOCK_SECONDS)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock:
            if _revision(path) is None:
                unfinished = path.with_name(f"{path.name}.new")
                unfinished.unlink(missing_ok=True)  # what a killed process left; we hold the lock
                _migrate(unfinished, path.parent / "artifacts")
                unfinished.replace(path)
    except Timeout as error:
        raise UserError(
            f"another process has been creating {path} for {_LOCK_SECONDS:.0f} s: end it, then run again"
        ) from error
    except OSError as error:
        raise UserError(
            f"tracking database {path} cannot be created ({error.strerror or error}): "
            "name a file in a folder that can be written, in tracking_uri or MLFLOW_TRACKING_URI"
        ) from error


def _migrate(path: Path, artifacts: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    # Seconds of migrations announce themselves at INFO, revision by revision; nobody can act on that.
    chatter = [logging.getLogger("mlflow.store.db.utils"), logging.getLogger("alembic")]
    levels = [logger.level for logger in chatter]
    for logger in chatter:
        logger.setLevel(logging.WARNING)
    try:
        store = SqlAlchemyStore(f"{_SQLITE}{path}", artifacts.as_uri())
        store.engine.dispose()
    finally:
        for logger, level in zip(chatter, levels, strict=True):
            logger.setLevel(level)


def _revision(path: Path) -> str | None:
    """Return the schema revision of a database, None where there is no file or an empty one."""
    if not path.exists() or path.stat().st_size == 0:
        return None
    try:
        # not read-only: what a killed writer left half done is rolled back by whoever opens the file next
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=20)) as connection:
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path} is not an MLflow database ({error}): name another file in the tracking URI") from error
    if row is None:
        raise UserError(f"{path} is a database of MLflow without a schema revision: move it away and run again")
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
    """Return the revision that no migration builds on, read off the files; None where they do not tell.

    Alembic runs every file for this, half a second at the start of every run; so it is asked only to refuse.
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
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        with limit_request_time():
            MlflowClient(uri).search_experiments(max_results=1)
    except MlflowException as error:
        port = urlsplit(uri).port or 5000
        raise UserError(
            f"tracking URI {mask_url_secrets(uri)} does not answer as an MLflow server ({describe_cause(error)}): "
            f"start one, `mlflow server --host 127.0.0.1 --port {port} --backend-store-uri {_EXAMPLE}`, "
            "or unset tracking_uri and MLFLOW_TRACKING_URI to use SQLite"
        ) from error
