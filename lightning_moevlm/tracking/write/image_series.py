"""Writes the files of an image in a series (MLflow's `log_image` with a step) without a store.

MLflow draws a new random name at each call, so a second attempt would leave a second image. Files that have their names
can be uploaded twice.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


def write_series_image(directory: Path, image: "Image", key: str, step: int) -> dict[str, str]:
    """Write the files under their artifact names below a directory; return the tags that belong to them."""
    from mlflow import MlflowClient

    tags: dict[str, str] = {}

    class ToDirectory(MlflowClient):
        """Names and shrinks as MLflow does, and keeps the files here."""

        def log_artifact(self, run_id: str, local_path: str, artifact_path: str | None = None) -> None:
            place = directory / (artifact_path or "")
            place.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(local_path, place / Path(local_path).name)

        def set_tag(self, run_id: str, key: str, value: Any, synchronous: bool | None = None) -> None:
            tags[key] = str(value)

    # Nothing listens at this address, and nothing is sent there.
    ToDirectory("http://127.0.0.1:9").log_image("0" * 32, image, key=key, step=step)
    return tags
