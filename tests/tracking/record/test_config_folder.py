import os
from pathlib import Path

import pytest

from lightning_moevlm.tracking.record.config_folder import write_config_folder


def test_each_start_gets_its_own(tmp_path: Path) -> None:
    folders = [write_config_folder(tmp_path / "run", {"config.yaml": str(n)}, taken=["config.1"]) for n in range(3)]
    assert [folder.name for folder in folders] == ["config", "config.2", "config.3"]
    assert [(folder / "config.yaml").read_text() for folder in folders] == ["0", "1", "2"]
    assert len(list((tmp_path / "run").iterdir())) == 3


def test_nothing_half_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_config_folder(tmp_path, {"a.yaml": "a", "no/such/folder.yaml": "b"}, taken=())
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - hidden files count
