"""`sweep status` says what the report says: which finished runs did not learn."""

from pathlib import Path

from lightning_moevlm.study import sweep
from lightning_moevlm.study.plan.planned_run import Plan
from tests.study.matrix.cure_runs import fill_store, loss_by_share, write_cures
from tests.study.tiny_study import plan_of


def planned(folder: Path, uri: str, **study: object) -> Plan:
    design = {"all": [], "on_healthy": []}
    return plan_of(write_cures(folder, "fever", ("warm",), uri, design=design, seeds=[0, 1], **study))


def test_a_finished_run_that_did_not_learn_is_told(uri: str, tmp_path: Path) -> None:
    plan = planned(tmp_path, uri, did_not_learn={"share_of_healthy": 0.8})
    fill_store(plan, uri, loss_by_share(warm=1.0))  # sick runs make half of the healthy way
    (table,), records = sweep.list_states(plan)
    states = {row["arm"]: (row["status"], row["reason"]) for row in records if row["seed"] == 0}
    assert [states[arm][0] for arm in ("healthy", "sick", "sick__warm")] == ["finished", "did not learn", "finished"]
    assert "at 0.50 of the way of healthy from 9 to 3; 0.8 is asked for" in states["sick"][1]
    assert table.notes[0] == "4 finished, 2 did not learn"
    (part,), records = sweep.list_states(plan, ["arm=sick"])  # the healthy runs judge, and are not shown
    assert [row["status"] for row in records] == ["did not learn"] * 2
    assert part.notes[0] == "2 did not learn"


def test_without_a_healthy_run_it_is_not_known(uri: str, tmp_path: Path) -> None:
    plan = planned(tmp_path, uri, did_not_learn={"share_of_healthy": 0.8})
    usual = loss_by_share(warm=1.0)
    fill_store(plan, uri, lambda arm, seed: None if arm == "healthy" and seed else usual(arm, seed))
    (table,), records = sweep.list_states(plan)
    assert [row["status"] for row in records if row["arm"] == "sick"] == ["did not learn", "finished"]
    waits = "whether it learned is not known yet: sick-seed1: healthy has no sound result with its seed"
    assert waits in table.notes


def test_a_rule_that_cannot_be_applied_leaves_the_states(uri: str, tmp_path: Path) -> None:
    rule = {"metric": "val/accuracy_text", "no_better_than": "val/majority_text"}
    plan = planned(tmp_path, uri, did_not_learn=rule)
    fill_store(plan, uri, loss_by_share(warm=1.0))
    (table,), records = sweep.list_states(plan)
    assert {row["status"] for row in records} == {"finished"}
    assert "the log has no val/accuracy_text" in table.notes[1]
