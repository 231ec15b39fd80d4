from pathlib import Path

import pytest

from lightning_moevlm.common import shipped_files
from lightning_moevlm.tracking.record.config_files import config_sources


def test_every_form_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.yaml", "b.yaml", "c.yaml"):
        Path(name).touch()
    argv = ["moevlm", "fit", "--config", "b.yaml", "--data.root", "c.yaml", "-c", "a.yaml", "--config=c.yaml"]
    assert config_sources(argv) == (Path("b.yaml"), Path("a.yaml"), Path("c.yaml"))
    assert config_sources(["moevlm", "fit", "--data.root", "c.yaml"]) == ()
    assert config_sources(["moevlm", "fit", "-c", "model:\n  dim: 3", "--config={a: 1}", "-c"]) == ()


def test_a_shipped_file_is_found_unless_one_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, here = tmp_path / "package", tmp_path / "here"
    for folder in (package / "conf", here / "conf"):
        folder.mkdir(parents=True)
    (package / "conf/quickstart.yaml").touch()
    monkeypatch.setattr(shipped_files, "shipped_root", lambda: package)
    monkeypatch.chdir(here)
    argv = ["moevlm", "fit", "-c", "conf/quickstart.yaml"]
    assert config_sources(argv) == (package / "conf/quickstart.yaml",)
    Path("conf/quickstart.yaml").touch()
    assert config_sources(argv) == (Path("conf/quickstart.yaml"),)
