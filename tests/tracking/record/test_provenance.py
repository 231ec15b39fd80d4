import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from lightning_moevlm.data.format import shard_reader
from lightning_moevlm.model.dispatch import capacity
from lightning_moevlm.model.routers.learned import top_k
from lightning_moevlm.tracking.record.provenance import checkout_of, code_digest, versions


def git(directory: Path, *words: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(["git", *identity, *words], cwd=directory, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_checkout_from_birth_to_edit(tmp_path: Path) -> None:
    assert checkout_of(tmp_path) is None  # no checkout
    git(tmp_path, "init", "-q")
    assert checkout_of(tmp_path) is None  # no commit
    (tmp_path / "a.py").write_text("a = 1\n")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert checkout_of(tmp_path) == (commit, False)
    (tmp_path / "b.py").write_text("b = 1\n")
    assert checkout_of(tmp_path) == (commit, True)  # a new file may be a new router
    (tmp_path / "b.py").unlink()
    (tmp_path / "a.py").write_text("a = 2\n")
    assert checkout_of(tmp_path) == (commit, True)


def test_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checkout_of(tmp_path) is None


@pytest.mark.parametrize("module", [top_k, capacity, shard_reader])
def test_an_edit_anywhere_in_the_package_is_other_code(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    read, edited = Path.read_bytes, Path(str(module.__file__))
    before = code_digest.__wrapped__()
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + (b"# edited" if path == edited else b""))
    assert code_digest.__wrapped__() != before


def test_versions() -> None:
    assert set(versions()) == {"python", "lightning_moevlm", "torch", "lightning", "mlflow"}
