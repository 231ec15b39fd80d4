"""Small real sets, built once per session; tests that break something work on a copy."""

import shutil
from pathlib import Path

import pytest

from lightning_moevlm.data.write.demo.scenes import build_scenes


@pytest.fixture(scope="session")
def scenes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 scenes of 32 pixels in shards of 16, jpg."""
    root = tmp_path_factory.mktemp("sets") / "scenes"
    build_scenes(root, 150, 32, "jpg", 16, seed=3, samples_per_shard=16, vocab_size=400, force=False)
    return root


@pytest.fixture
def scenes_copy(scenes_root: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(scenes_root, tmp_path / "scenes"))
