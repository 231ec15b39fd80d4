"""The golden plans of the shipped studies: any change of an arm, a base, a default or the digest shows here first.

After a change that is meant: make plan-golden, and read the difference.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_moevlm.configuration.resolver import ConfigResolver, describe_model
from lightning_moevlm.contracts.answer_list import AnswerList, write_answers
from lightning_moevlm.study.declare.study_file import read_study
from lightning_moevlm.study.plan.plan_study import plan_study
from lightning_moevlm.study.plan.planned_run import Plan

REPOSITORY = Path(__file__).parents[3]
ABLATIONS = REPOSITORY / "ablations"
STUDIES = sorted(path.relative_to(ABLATIONS).with_suffix("").as_posix() for path in ABLATIONS.rglob("*.yaml"))
IN_EVERY_RUN = {"quickstart"}  # an arm takes half a second and more


@pytest.fixture(scope="module")
def resolver() -> ConfigResolver:
    return ConfigResolver()


@pytest.mark.parametrize(
    "study", [study if study in IN_EVERY_RUN else pytest.param(study, marks=pytest.mark.slow) for study in STUDIES]
)
def test_plan_is_the_golden_one(
    study: str, resolver: ConfigResolver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if study.startswith("adopted"):
        pytest.importorskip("transformers", reason="needs the extra hf: pip install 'lightning-moevlm[hf]'")
    for folder in ("conf", "ablations"):
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    answers = tmp_path / "data/shards/scenes-20k-questions/answers.json"
    answers.parent.mkdir(parents=True)
    write_answers(AnswerList(tuple(f"answer {n}" for n in range(41)), (1,) * 41, "0" * 64), answers)
    monkeypatch.chdir(tmp_path)
    declared = read_study(Path(f"ablations/{study}.yaml"))
    if study != "quickstart":  # seeds differ in the seed alone, and resolving takes half a second per run
        one_seed = replace(declared.comparison, seeds=declared.comparison.seeds[:1])
        declared = replace(declared, comparison=one_seed)
    plan = plan_study(declared, resolver, describe_model)
    told = {
        "arms": {name: card._asdict() for name, card in plan.cards.items()},
        "runs": [
            {"name": run.name, "seed": run.seed, "digest": run.digest, "overrides": run.overrides} for run in plan.runs
        ],
    }
    text = json.dumps(told, indent=1) + "\n"
    golden = REPOSITORY / "tests" / "golden" / f"{study}_plan.json"
    if os.environ.get("MOEVLM_WRITE_GOLDEN") == "1":
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert json.loads(text) == json.loads(golden.read_text())
    check_pairing(plan)
    if study == "quickstart":
        check_quickstart(plan)


def check_pairing(plan: Plan) -> None:
    """The data order and the initial weights of a seed are those of every arm."""
    for run in plan.runs:
        assert (
            run.resolved["seed_everything"] == run.resolved["data"]["seed"] == run.resolved["model"]["seed"] == run.seed
        )


def check_quickstart(plan: Plan) -> None:
    """What the study claims, whatever the numbers are."""
    cards = plan.cards
    flops = cards["baseline"].active_flops_per_sample
    assert cards["dense_twin"].active_flops_per_sample == pytest.approx(flops, rel=0.01)
    assert cards["dense_twin"].total_parameters < cards["baseline"].total_parameters
    assert cards["no_router_z"] == cards["no_load_balance"] == cards["baseline"]
