import subprocess
from pathlib import Path

import pytest

from lightning_moevlm.tracking.record.provenance import checkout_of, versions


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


def test_versions() -> None:
    assert set(versions()) == {"python", "lightning_moevlm", "torch", "lightning", "mlflow"}
