"""`--only`: the runs that match; an unknown name is refused with the nearest one."""

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.plan.selection import select
from lightning_moevlm.study.report.plan_records import plan_records
from lightning_moevlm.study.report.tables.plan_tables import arms_table, plan_table, status_table
from lightning_moevlm.study.run.ledger import read_ledger
from tests.study.tiny_study import plan_of, write_project


@pytest.mark.parametrize(
    ("only", "names"),
    [
        ([], ["baseline-seed0", "baseline-seed1", "fast-seed0", "fast-seed1"]),
        (["arm=fast"], ["fast-seed0", "fast-seed1"]),
        (["arm=fast,baseline", "seed=1"], ["baseline-seed1", "fast-seed1"]),
        (["seed=0", "seed=1", "arm=baseline"], ["baseline-seed0", "baseline-seed1"]),
    ],
)
def test_runs_that_agree(tmp_path, only, names):
    plan = plan_of(write_project(tmp_path, "sqlite:///x.db"))
    selected = select(plan, only)
    assert [run.name for run in selected.runs] == names
    assert {arm.name for arm in selected.comparison.arms} == {run.arm for run in selected.runs}
    assert {run.digest for run in selected.runs} <= {run.digest for run in plan.runs}


def test_tables_and_records_of_a_part_without_the_baseline(tmp_path):
    selected = select(plan_of(write_project(tmp_path, "sqlite:///x.db")), ["arm=fast", "seed=1"])
    statuses = {run.folder: "planned" for run in selected.runs}
    assert [row[0] for row in arms_table(selected, {}).rows] == ["fast"]
    assert len(plan_table(selected, statuses).rows) == 1
    assert [(record["arm"], record["seed"]) for record in plan_records(selected, statuses)] == [("fast", 1)]
    assert [row[0] for row in status_table(selected, read_ledger(selected)).rows] == ["fast-seed1"]


@pytest.mark.parametrize(
    ("only", "told"),
    [
        ("arm=fats", "--only arm=fats: tiny has no arm 'fats'; did you mean 'fast'? choose baseline, fast"),
        ("seed=7", "--only seed=7: tiny has no seed '7'; choose 0, 1"),
        ("arms=fast", "--only arms=fast: did you mean 'arm'? give arm=NAME or seed=NUMBER"),
        ("fast", "--only fast: give arm=NAME or seed=NUMBER"),
        ("arm=", "--only arm=: tiny has no arm ''; choose baseline, fast"),
    ],
)
def test_an_unknown_name(tmp_path, only, told):
    plan = plan_of(write_project(tmp_path, "sqlite:///x.db"))
    with pytest.raises(UserError) as refusal:
        select(plan, [only])
    assert str(refusal.value) == told
