"""`moevlm data check`, `show` and `codebook` on a set that lies on a server."""

from pathlib import Path

import pytest

from lightning_moevlm.cli.main import main
from tests.data.unsteady_server import Unsteady, serve


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_set_is_checked_and_shown_where_it_is(
    scenes_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with serve(Unsteady(scenes_root, drops=2, login="anna:s3cr3t")) as server:
        root = f"{server.url.replace('://', '://anna:s3cr3t@')}/?sig=s1gnature"
        assert main(["data", "check", root, "--json", "card.json"]) == 0
        assert main(["data", "check", str(scenes_root), "--json", "local.json"]) == 0
        assert Path("card.json").read_text() == Path("local.json").read_text()
        tars = [path for path, _ in server.asked if ".tar" in path]
        assert main(["data", "show", root, "--out", "page.html"]) == 0
        assert [path for path, _ in server.asked if ".tar" in path] == tars, "shards should come from the cache"
        assert "scene-3-" in Path("page.html").read_text()
        for command in ("show", "codebook"):
            capfd.readouterr()
            assert main(["data", command, root]) == 2
            printed = capfd.readouterr().err
            assert "is on a server, where nothing is written; name a file with --out" in " ".join(printed.split())
        assert (
            main(["data", "codebook", root, "--num_codes", "8", "--patch_size", "8", "--out", "codes.safetensors"]) == 0
        )
        assert Path("codes.safetensors").is_file()
        printed = "".join(capfd.readouterr())
    assert "s3cr3t" not in printed and "s1gnature" not in printed


def test_its_faults_are_reported(scenes_copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (scenes_copy / "val-000000.tar").unlink()
    with serve(Unsteady(scenes_copy)) as server:
        assert main(["data", "check", server.url]) == 2
        printed = capfd.readouterr().err
        assert f"{server.url}/val-000000.tar is missing" in printed.replace("\n", "")
    assert main(["data", "check", "pipe:cat x"]) == 2
    assert "shell commands are not allowed" in " ".join(capfd.readouterr().err.split())
