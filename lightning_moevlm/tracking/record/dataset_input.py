"""Logs a run's data as MLflow's dataset input: the set of shards by the digest of its manifest."""

import json
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput

_LONGEST_DIGEST = 36  # characters; MLflow's limit
DIGEST_TAG = "manifest_digest"


@runtime_checkable
class HasManifest(Protocol):
    """A datamodule that knows the set of shards that it reads."""

    @property
    def manifest_digest(self) -> str:
        """The SHA-256 of the manifest's content, hexadecimal digits."""
        ...

    @property
    def manifest(self) -> object:
        """The manifest as a record; its `name`, if any, is the set's."""
        ...


def dataset_input(source: HasManifest) -> "DatasetInput":
    """Return the input of context `train`, with the 36 characters of a digest that MLflow takes."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    name = str(getattr(source.manifest, "name", "shards"))
    dataset = Dataset(
        name=name,
        digest=source.manifest_digest[:_LONGEST_DIGEST],
        source_type="webdataset",
        source=json.dumps({"manifest_sha256": source.manifest_digest}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "train")])


def log_dataset(client: "MlflowClient", run_id: str, source: HasManifest) -> None:
    """Log a run's input of context `train`; several runs may log the same one at once.

    MLflow looks a dataset up, then inserts it: of two runs between these steps one fails, and finds the other's on its
    second try.
    """
    from mlflow.exceptions import MlflowException

    entry = dataset_input(source)
    try:
        client.log_inputs(run_id, [entry])
    except MlflowException:
        client.log_inputs(run_id, [entry])
