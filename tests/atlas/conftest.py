"""Scenes of all categories, made once."""

from functools import partial
from pathlib import Path

import pytest

from lightning_moevlm.atlas.make_atlas import Atlas
from tests.atlas.observed import NUM_DRAWINGS, SIZES, PlantedRouter, observe, open_data, small_model, tokens_of
from tests.conftest import make_once


@pytest.fixture(scope="session")
def many_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 scenes of 32 pixels with 64 drawings."""
    from lightning_moevlm.data.write.demo.scenes import build_scenes

    def build(root: Path) -> None:
        build_scenes(root, 300, 32, "jpg", NUM_DRAWINGS, 5, 50, SIZES["vocab_size"], force=False)

    return make_once(tmp_path_factory, "many-scenes", build)


@pytest.fixture(scope="session")
def planted(many_scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    """The atlas of a model whose expert 0 gets the words of fruit and nothing else."""
    words = tokens_of(open_data(many_scenes), "fruit")
    assert len(words) >= 3
    model = small_model(partial(PlantedRouter, planted=words))
    return observe(many_scenes, model, tmp_path_factory.mktemp("planted"), draws=199, samples=200)
