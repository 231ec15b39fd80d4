"""Tests that break something work on a copy of the small real set."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def scenes_copy(scenes_root: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(scenes_root, tmp_path / "scenes"))
