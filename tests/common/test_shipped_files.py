"""conf/ and ablations/ are found from any folder, whichever way the package is installed."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lightning_moevlm.common.shipped_files import describe_missing_file, find_file, shipped_root
from tests.conftest import PROJECT

QUICKSTART = Path("conf/quickstart.yaml")


def test_an_editable_install_has_them_beside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_file(QUICKSTART) == PROJECT / QUICKSTART
    assert find_file(Path("ablations/quickstart.yaml")) == PROJECT / "ablations/quickstart.yaml"
    assert find_file(Path("README.md")) is None  # beside the package, and not shipped
    (tmp_path / "conf").mkdir()
    (tmp_path / QUICKSTART).touch()
    assert find_file(QUICKSTART) == QUICKSTART  # one's own goes before


def test_a_wheel_has_them_inside(tmp_path: Path) -> None:
    package = tmp_path / "site-packages/lightning_moevlm"
    assert shipped_root(package) == tmp_path / "site-packages"
    (package / "conf").mkdir(parents=True)
    assert shipped_root(package) == package


def test_a_file_that_is_not_there_is_told_with_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = str(describe_missing_file("study file", Path("quickstrat.yaml")))
    assert told.startswith("there is no study file quickstrat.yaml; did you mean ")
    assert told.endswith(f"quickstart.yaml? the shipped ones are in {PROJECT / 'conf'} and {PROJECT / 'ablations'}")
    assert "did you mean" not in str(describe_missing_file("study file", Path("xyzzy.yaml")))
    (tmp_path / "mine.yaml").touch()
    assert "did you mean mine.yaml?" in str(describe_missing_file("study file", Path("mein.yaml")))


@pytest.mark.slow
def test_a_built_wheel_finds_its_own(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(PROJECT)]
    subprocess.run(build, check=True, timeout=250)
    site = tmp_path / "site"
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(site)
    script = (
        "from pathlib import Path; from lightning_moevlm.common.shipped_files import find_file; "
        "print(find_file(Path('{}')))"
    )
    for name in ("conf/quickstart.yaml", "ablations/quickstart.yaml"):
        found = subprocess.run(
            [sys.executable, "-c", script.format(name)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(site)},
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert found.stdout.strip() == str(site / "lightning_moevlm" / name)
