"""A report of 500 runs, by a process of its own, in bounded time and memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.study.many_runs import fill, plan_many

_SECONDS, _BYTES = 60.0, 2e9


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_500_runs(migrated_database: Path, tmp_path: Path) -> None:
    """100 arms x 5 seeds, 63 keys x 100 points each: 3.15 million points."""
    database = tmp_path / "mlflow.db"
    shutil.copyfile(migrated_database, database)
    assert fill(plan_many(tmp_path, num_arms=100, num_seeds=5), f"sqlite:///{database}", num_points=100) == 63
    done = subprocess.run(
        [sys.executable, "-m", "tests.study.many_runs", str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seconds, cpu, peak, page_size = json.loads(done.stdout.splitlines()[-1])
    print(
        f"\n500 runs, database of {database.stat().st_size / 1e6:.0f} MB: report in {seconds:.1f} s ({cpu:.1f} s of "
        f"CPU), peak {peak / 1e6:.0f} MB, page {page_size / 1e6:.2f} MB"
    )
    html = (tmp_path / "report" / "report.html").read_text()
    assert "Pictures show 20 of 100 arms" in html
    assert all(f">skew_<wbr>{i}</th>" in html for i in range(99))
    assert peak < _BYTES
    assert cpu < _SECONDS  # wall time depends on what else the machine does
