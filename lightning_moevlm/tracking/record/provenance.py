"""Identifies the code of a run: the git commit, edits since, and versions of the packages below."""

import hashlib
import platform
import subprocess
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from lightning_moevlm import __version__

CODE_TAG = "code_digest"
SLURM_JOB_TAG = "slurm_job"
"""A job that SLURM restarts finds its run by it."""
_GIT_SECONDS = 10
_PACKAGES = ("torch", "lightning", "mlflow")


class Checkout(NamedTuple):
    """A git checkout."""

    commit: str
    dirty: bool
    """Files differ from the commit, or git does not know them."""


def checkout_of(directory: Path) -> Checkout | None:
    """Return the checkout around `directory`; None outside of one, before a first commit, without git."""
    commit = _git(directory, "rev-parse", "--verify", "HEAD")
    changed = _git(directory, "status", "--porcelain")
    if commit is None or changed is None:
        return None
    return Checkout(commit, bool(changed))


@cache  # this process and its forks keep what they have imported, whatever is committed since
def code_checkout() -> Checkout | None:
    """Return the checkout that this package runs from; of an installed package, the working directory's."""
    package = Path(__file__).parent
    if _git(package, "ls-files", "--error-unmatch", Path(__file__).name) is not None:
        return checkout_of(package)
    return checkout_of(Path.cwd())


@cache
def code_digest() -> str:
    """Return a hash of this package's source, the same in every place and without git."""
    package = import_module(__name__.partition(".")[0])
    return digest_sources([Path(next(iter(package.__path__)))])


def digest_sources(places: Iterable[Path]) -> str:
    """Return a hash of Python files, each given itself or by a folder above; the same wherever they lie."""
    digest = hashlib.sha256()
    for place in places:
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(f"{file.relative_to(place).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return {name: version} of Python and of the packages whose version changes results."""
    own = {"python": platform.python_version(), "lightning_moevlm": __version__}
    return own | {name: version(name) for name in _PACKAGES}


def _git(directory: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *words],
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            check=False,
        )
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() if done.returncode == 0 else None
