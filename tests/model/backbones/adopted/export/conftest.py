"""What tests of exports share."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies files of models to a cache of the user's."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
