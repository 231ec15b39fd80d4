"""Lets a project folder that was moved or copied keep its artifacts.

MLflow writes absolute addresses of artifacts into its SQLite file, so it would create the old folder again, or read
from it. The artifacts of the default experiment lie beside the file and show where it was made.
"""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lightning_moevlm.tracking.read.sqlite_rows import BUSY_SECONDS

_DEFAULT = "SELECT artifact_location FROM experiments WHERE experiment_id = 0"
_ADDRESSES = (("experiments", "artifact_location"), ("runs", "artifact_uri"))


def follow_move(path: Path) -> None:
    """Have MLflow's SQLite file (absolute path) name the artifacts beside it, if it was made elsewhere.

    Nothing changes where the artifacts have stayed behind. Repeating it costs one query.
    """
    here = path.parent / "artifacts"
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=BUSY_SECONDS)) as store, store:
        row = store.execute(_DEFAULT).fetchone()
        before = "" if row is None else str(row[0]).removesuffix("/0")
        if before == here.as_uri() or not before.startswith("file://") or not before.endswith("/artifacts"):
            return
        if not here.is_dir() and Path(unquote(urlsplit(before).path)).is_dir():
            return
        for table, column in _ADDRESSES:
            store.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                (here.as_uri(), len(before) + 1, len(before) + 1, f"{before}/"),
            )
