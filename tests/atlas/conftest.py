"""Scenes of all categories, made once."""

from pathlib import Path

import pytest

from tests.atlas.observed import NUM_DRAWINGS, SIZES
from tests.conftest import make_once


@pytest.fixture(scope="session")
def many_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 scenes of 32 pixels with 64 drawings."""
    from lightning_moevlm.data.write.demo.scenes import build_scenes

    def build(root: Path) -> None:
        build_scenes(root, 300, 32, "jpg", NUM_DRAWINGS, 5, 50, SIZES["vocab_size"], force=False)

    return make_once(tmp_path_factory, "many-scenes", build)
