"""The code of one's own that a configuration names has a digest per package, and every edit moves it."""

import importlib
import types
from pathlib import Path

import pytest

from lightning_moevlm.tracking.record.foreign_code import foreign_code_tags, foreign_packages


def config(*paths: str) -> dict[str, object]:
    return {"model": {"parts": [{"class_path": path} for path in paths]}, "other": "unread.Section"}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_module.py").write_text("class A: pass\n")
    (tmp_path / "own_package" / "deep").mkdir(parents=True)
    (tmp_path / "own_package" / "__init__.py").write_text("")
    (tmp_path / "own_package" / "deep" / "maths.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return tmp_path


def test_packages_that_have_a_version_or_belong_to_python_are_left_out() -> None:
    named = (
        "lightning_moevlm.model.X",
        "lightning.pytorch.X",
        "torch.nn.ReLU",
        "collections.OrderedDict",
        "TopKRouter",
    )
    assert foreign_packages(config(*named)) == set()
    assert foreign_packages(config("own_module.A", "0.5")) == {"own_module"}
    assert foreign_code_tags(config("there.is.NoSuch")) == {}


@pytest.mark.parametrize("file", ["own_module.py", "own_package/deep/maths.py"])
def test_every_edit_moves_the_digest_of_its_package_alone(project: Path, file: str) -> None:
    whole = config("own_module.A", "own_package.router.B")
    before = foreign_code_tags(whole)
    assert before.keys() == {"code_digest/own_module", "code_digest/own_package"}
    assert foreign_code_tags(whole) == before
    (project / file).write_text("# edited\n")
    after = foreign_code_tags(whole)
    package = file.split("/")[0].removesuffix(".py")
    assert {key for key in before if before[key] != after[key]} == {f"code_digest/{package}"}


def test_a_module_that_was_made_at_run_time_has_no_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "made_now", types.ModuleType("made_now"))
    assert foreign_code_tags(config("made_now.X")) == {}
