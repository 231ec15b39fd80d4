"""Runs of one set of shards share one dataset of MLflow, also those that start in the same moment."""

import sqlite3
from contextlib import closing

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy import event
from sqlalchemy.orm import Session

from lightning_moevlm.tracking.record.dataset_input import dataset_input, log_dataset
from lightning_moevlm.tracking.store import sqlite_path


class _Manifest:
    name = "scenes"


class _Shards:
    manifest = _Manifest()
    manifest_digest = "5f" * 32


def _insert_as_a_rival(uri: str) -> None:
    """Put the dataset into the store the moment before the next session writes what it found missing."""

    def insert(*_: object) -> None:
        row = ("rival", 0, "scenes", _Shards.manifest_digest[:36], "webdataset", "{}")
        path = sqlite_path(uri)
        assert path is not None
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute(
                "INSERT INTO datasets (dataset_uuid, experiment_id, name, digest, dataset_source_type, dataset_source)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                row,
            )

    event.listen(Session, "before_flush", insert, once=True)


def test_a_rival_run_that_is_faster_is_no_error(uri: str) -> None:
    client = MlflowClient(uri)
    first, second = (client.create_run("0").info.run_id for _ in range(2))
    _insert_as_a_rival(uri)
    with pytest.raises(MlflowException, match="UNIQUE constraint failed: datasets"):  # what one try meets
        client.log_inputs(first, [dataset_input(_Shards())])
    with closing(sqlite3.connect(str(sqlite_path(uri)))) as connection, connection:
        connection.execute("DELETE FROM datasets")

    _insert_as_a_rival(uri)
    log_dataset(client, first, _Shards())
    log_dataset(client, second, _Shards())

    with closing(sqlite3.connect(str(sqlite_path(uri)))) as connection:
        assert connection.execute("SELECT dataset_uuid FROM datasets").fetchall() == [("rival",)]
    for run_id in (first, second):
        (entry,) = client.get_run(run_id).inputs.dataset_inputs
        assert (entry.dataset.name, entry.tags[0].value) == ("scenes", "train")
