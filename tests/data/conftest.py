"""Sets to break: a copy of the small real one, and tars without a manifest, in a folder and behind a server."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.found_tars import folder_of, three_tars
from tests.data.unsteady_server import Unsteady, serve


@pytest.fixture
def scenes_copy(scenes_root: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(scenes_root, tmp_path / "scenes"))


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """A folder of three tars with eight samples each; the keys are numbers."""
    return folder_of(tmp_path / "web", *three_tars(8))


@pytest.fixture
def server(tars: Path) -> Iterator[Unsteady]:
    with serve(Unsteady(tars)) as behaviour:
        yield behaviour
