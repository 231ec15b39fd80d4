"""The probe by hand: the estimate from times, the options of the probing run, and the text of a failure."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.plan.planned_run import Plan
from lightning_moevlm.study.report.plan_records import plan_records
from lightning_moevlm.study.report.tables.plan_tables import arms_table
from lightning_moevlm.study.run.probe import NUM_STEPS, Probe, num_validations, probe_arms
from tests.study.tiny_study import plan_of, write_project

TRAIN = """
import json, pathlib, sys, yaml
overrides = yaml.safe_load(pathlib.Path(sys.argv[1]).read_text())
pathlib.Path(sys.argv[2]).write_text(json.dumps(overrides))
step = overrides.get("model", {}).get("speed", 0.5)
times = {"step_seconds": [9.0, 9.0, 9.0, step, step, 5 * step, step, step], "validation_seconds": [8.0, 2.0]}
pathlib.Path(overrides["trainer"]["callbacks"][-1]["init_args"]["file"]).write_text(json.dumps(times))
"""


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    file = write_project(tmp_path, "sqlite:///x.db", {"budget": {"max_steps": 10}})
    base = yaml.safe_load((tmp_path / "base.yaml").read_text())
    base["trainer"]["callbacks"] = [{"class_path": "a.Guard"}, {"class_path": "b.ModelCheckpoint"}]
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    return plan_of(file)


def test_estimates_by_hand(plan, tmp_path):
    told: list[str] = []
    given = tmp_path / "given.json"
    probes = probe_arms(plan, lambda file: [sys.executable, "-c", TRAIN, str(file), str(given)], told.append)
    assert told == ["baseline", "fast"]
    # the first three steps warm up, the median passes over one slow step; the first validation warms up
    assert (probes["baseline"].step, probes["fast"].step, probes["fast"].validation) == (0.5, 0.9, 2.0)
    assert probes["fast"].start == 0.0  # the script only pretends to have taken its time
    trainer = json.loads(given.read_text())["trainer"]
    assert (trainer["max_steps"], trainer["logger"], trainer["enable_checkpointing"]) == (NUM_STEPS, False, False)
    assert [callback["class_path"] for callback in trainer["callbacks"]] == [
        "a.Guard",
        "lightning_moevlm.training.callbacks.StepTimes",
    ]
    assert not Path(trainer["default_root_dir"]).exists()  # nothing is left behind


def test_a_run_by_hand(plan):
    run = plan.runs[0]  # 10 steps; validated untrained and at the end
    assert Probe(start=4.0, validation=2.0, step=0.5).run_seconds(run, None) == 4 + 2 * 2 + 10 * 0.5
    probes = {"baseline": Probe(4.0, 2.0, 0.5), "fast": Probe(4.0, 2.0, 1.0)}
    records = plan_records(plan, {run.folder: "planned" for run in plan.runs}, probes)
    assert [record["estimated_seconds"] for record in records] == [13.0, 13.0, 18.0, 18.0]
    table = arms_table(plan, probes)
    assert [row[4:6] for row in table.rows] == [("500 ms", "13 s"), ("1000 ms", "18 s")]
    assert table.notes[0].startswith("estimate: 62 s for all 4 runs, one at a time on this machine")
    assert arms_table(plan).notes == ()
    assert all(
        record["estimated_seconds"] is None
        for record in plan_records(plan, dict.fromkeys([run.folder for run in plan.runs], "planned"))
    )


@pytest.mark.parametrize(
    ("trainer", "validations"),
    [
        # untrained, after 20, 40 and 60 of 60 steps
        ({"val_check_interval": 20, "check_val_every_n_epoch": None}, 4),
        # untrained, after 25, 50 and 60
        ({"val_check_interval": 25, "check_val_every_n_epoch": None}, 4),
        # 80 micro-batches are 20 steps
        ({"val_check_interval": 80, "accumulate_grad_batches": 4, "check_val_every_n_epoch": None}, 4),
        ({"val_check_interval": 20, "num_sanity_val_steps": 0, "check_val_every_n_epoch": None}, 3),
        ({"val_check_interval": 0.5}, 2),
        ({}, 2),
    ],
)
def test_validations_by_hand(trainer, validations):
    assert num_validations({"trainer": trainer}, 60) == validations


def test_an_arm_that_does_not_train_is_an_error(plan):
    fail = "import sys; print('moevlm: error: no such file'); sys.exit(2)"
    with pytest.raises(UserError, match=r"arm 'baseline' does not train \(exit code 2\): moevlm: error: no such file"):
        probe_arms(plan, lambda file: [sys.executable, "-c", fail], lambda arm: None)
