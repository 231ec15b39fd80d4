"""A signed address of a set works, and stands nowhere in what runs leave behind."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.unsteady_server import Unsteady, serve
from tests.small_run import SMALL, budget

LOGIN, SIGNATURE = "anna:s3cr3t-pass", "s1gnature-0f-a-set"
SECRETS = ("s3cr3t-pass", "s1gnature")


def _refuse_secrets(folder: Path) -> int:
    """Look into every file that runs have left; return how many there were."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        for secret in SECRETS:
            assert secret.encode() not in path.read_bytes(), f"{secret} stands in {path}"
            assert secret not in str(path)
    return len(files)


@pytest.mark.slow
def test_a_run_on_a_signed_address_keeps_the_signature_secret(
    scenes_root: Path,
    workplace: Path,
    moevlm: Callable[..., str],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    with serve(Unsteady(scenes_root, login=LOGIN)) as server:
        root = f"{server.url.replace('://', f'://{LOGIN}@')}/?X-Amz-Signature={SIGNATURE}&t=1"
        cache = f"--data.cache_dir={workplace / 'cache'}"
        (workplace / "signed.yaml").write_text(f"data: {{root: '{root}'}}\n", encoding="utf-8")
        printed = moevlm("fit", *SMALL, *budget(2), cache, "-c", "signed.yaml")
        printed += moevlm("fit", *SMALL, *budget(2), cache, f"--data.root={root}")
        for wrong in (
            f"--data.root={root.replace('s3cr3t', 'wr0ng')}",
            f"--data.root={root.replace('http', 'ftp')}",
            f"--data.batch_size={root}",
            f"--data.rot={root}",
            f"--data.sources={{a: {{root: '{root}'}}}}",
            f"--data.sources={{a: {{root: '{root}', weight: -1}}}}",
        ):
            printed += moevlm("fit", *SMALL, *budget(2), cache, "-c", "signed.yaml", wrong, code=2)
    for secret in (*SECRETS, "wr0ng"):
        assert secret not in printed + caplog.text
    assert _refuse_secrets(workplace / "runs") > 5
    assert _refuse_secrets(workplace / "cache") > 2
