"""MLflow's tables in an SQLite file, read by themselves: its client asks for one key of one run at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Connection

_BUSY_SECONDS = 20.0
"""How long a writer may keep a reader out; MLflow's own patience."""


@contextmanager
def reading(path: Path) -> "Iterator[Connection]":
    """Hold a connection that writes nothing.

    Raises:
        MlflowException: the file is busy for too long, or no database: as MLflow itself says of what it cannot read.
    """
    import sqlalchemy
    from mlflow.exceptions import MlflowException

    engine = sqlalchemy.create_engine(
        f"sqlite:///{path}", poolclass=sqlalchemy.NullPool, connect_args={"timeout": _BUSY_SECONDS}
    )
    try:
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text("PRAGMA query_only = ON"))
            yield connection
    except sqlalchemy.exc.DatabaseError as error:
        raise MlflowException(f"{path} cannot be read: {error.orig}") from error
