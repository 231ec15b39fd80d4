"""The golden plan of the shipped study: any change of an arm, a base, a default or the digest shows here first.

After a change that is meant: MOEVLM_WRITE_GOLDEN=1 pytest tests/study/test_golden_plan.py, and read the difference.
"""

import json
import os
from pathlib import Path

from lightning_moevlm.lightning_cli import ConfigResolver, describe_model
from lightning_moevlm.study.plan import plan_study
from lightning_moevlm.study.spec import read_study

REPOSITORY = Path(__file__).parents[2]
GOLDEN = REPOSITORY / "tests" / "golden" / "quickstart_plan.json"


def test_plan_of_the_quickstart_study(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    plan = plan_study(read_study(Path("ablations/quickstart.yaml")), ConfigResolver(), describe_model)
    told = {
        "arms": {name: card._asdict() for name, card in plan.cards.items()},
        "runs": [
            {"name": run.name, "seed": run.seed, "digest": run.digest, "overrides": run.overrides} for run in plan.runs
        ],
    }
    text = json.dumps(told, indent=1) + "\n"
    if os.environ.get("MOEVLM_WRITE_GOLDEN"):
        GOLDEN.write_text(text)
    assert json.loads(text) == json.loads(GOLDEN.read_text())

    # What the study claims, whatever the numbers are.
    cards = plan.cards
    assert cards["dense_twin"].active_flops_per_sample == approximately(cards["baseline"].active_flops_per_sample)
    assert cards["dense_twin"].total_parameters < cards["baseline"].total_parameters
    assert cards["no_router_z"] == cards["no_load_balance"] == cards["baseline"]
    for run in plan.runs:  # the data order and the initial weights of a seed are those of every arm
        assert (
            run.resolved["seed_everything"] == run.resolved["data"]["seed"] == run.resolved["model"]["seed"] == run.seed
        )


def approximately(value: float):
    import pytest

    return pytest.approx(value, rel=0.01)
