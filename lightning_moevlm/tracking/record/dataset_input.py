"""The data of a run, as MLflow's dataset input: which set of shards, by the digest of its manifest."""

import json
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput

_LONGEST_DIGEST = 36  # characters; MLflow's limit
DIGEST_TAG = "manifest_digest"


@runtime_checkable
class HasManifest(Protocol):
    """A datamodule that knows which set of shards it reads. manifest_digest: sha256 as hexadecimal digits."""

    @property
    def manifest_digest(self) -> str:
        """The digest of the manifest's content."""
        ...

    @property
    def manifest(self) -> object:
        """The manifest as a record; its `name`, if it has one, names the set."""
        ...


def dataset_input(source: HasManifest) -> "DatasetInput":
    """Return the input of context `train`. MLflow has room for 36 characters of a digest."""
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
    """Give a run its input of context `train`; runs that start at once may give the same one.

    MLflow looks a dataset up and inserts it where it finds none: of two runs between these two steps one fails on the
    dataset's uniqueness. It finds the other's on the second try.
    """
    from mlflow.exceptions import MlflowException

    entry = dataset_input(source)
    try:
        client.log_inputs(run_id, [entry])
    except MlflowException:
        client.log_inputs(run_id, [entry])
