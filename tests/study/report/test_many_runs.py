"""A report of 500 runs, by a process of its own, in bounded time and memory."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_moevlm.configuration.resolver import ConfigResolver, ModelDescriber
from lightning_moevlm.study.declare.study_file import read_study
from lightning_moevlm.study.plan.plan_study import plan_study
from tests.study.many_runs import fill, plan_many

_SECONDS, _BYTES = 60.0, 2e9
_COMMAND = """
import json, resource, sys, time
from lightning_moevlm.cli.main import main
code = main(["sweep", "report", "many.yaml"])
print(json.dumps([time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]), file=sys.stderr)
sys.exit(code)
"""


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
    assert "Figures show 20 of 100 arms" in html
    assert all(f">skew_<wbr>{i}</th>" in html for i in range(99))
    assert peak < _BYTES
    assert cpu < _SECONDS  # wall time depends on what else the machine does


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_500_runs_by_the_command_line(workplace: Path) -> None:
    """50 arms x 10 seeds, of which no two have the same model; imports and planning are in the time."""
    sizes, weights = (4, 6, 8, 12, 16), [0.0, *(10.0**-power for power in range(9))]
    arms = {
        f"e{experts}_z{place}": {
            "model.backbone.init_args.moe.init_args.num_experts": experts,
            "model.losses.router_z.weight": weight,
        }
        for experts, (place, weight) in itertools.product(sizes, enumerate(weights))
        if (experts, weight) != (8, 1e-3)  # the baseline
    }
    study = {
        "question": "How long does it take?",
        "base": ["conf/quickstart.yaml"],
        "arms": {"baseline": None, **arms},
        "seeds": list(range(10)),
        "budget": {"max_steps": 500},
        "primary": {"metric": "val/task_loss"},
        "decide": {"correction": "holm"},
    }
    (workplace / "many.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    plan = plan_study(read_study(Path("many.yaml")), ConfigResolver(), ModelDescriber(complete=True))
    assert len({run.digest for run in plan.runs}) == 500
    fill(plan, f"sqlite:///{workplace / 'runs/mlflow.db'}", num_points=100)
    done = subprocess.run(
        [sys.executable, "-c", _COMMAND],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    cpu, peak = json.loads(done.stderr.splitlines()[-1])
    peak *= 1 if sys.platform == "darwin" else 1024
    print(f"\n500 runs by the command line: {cpu:.1f} s of CPU, peak {peak / 1e6:.0f} MB")
    html = (workplace / "runs/sweeps/many/report/report.html").read_text().replace("<wbr>", "")
    assert all(f">{arm}</th>" in html for arm in arms)
    assert peak < _BYTES
    assert cpu < _SECONDS  # wall time depends on what else the machine does
