"""Runs of the tracker as a comparison: arms, seeds, states, refusals; and the numbers of a study's own report."""

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.flat_config import flatten
from lightning_moevlm.study.compare.collect_results import collect_results, compare_arms
from lightning_moevlm.study.compare.logged_runs import (
    Rules,
    comparison_of_runs,
    describe_changes,
    read_runs,
    refuse_unchecked,
    suggest_remedy,
)
from lightning_moevlm.study.compare.results import StudyResult
from lightning_moevlm.study.plan.planned_run import Plan
from lightning_moevlm.study.report.make_report import describe_origin, make_report
from lightning_moevlm.study.report.result_records import make_records
from lightning_moevlm.study.report.tables.logged_runs_table import runs_table
from lightning_moevlm.study.report.tables.report_tables import report_tables
from lightning_moevlm.study.report.write_report import refuse_other_folder, write_report
from lightning_moevlm.study.run.ledger import Status, read_ledger
from lightning_moevlm.study.statistics.verdict import Verdict
from lightning_moevlm.tracking.read.run_selection import choose_runs
from lightning_moevlm.tracking.read.runs import RunRow
from lightning_moevlm.tracking.read.series import Series, metric_series
from tests.study.many_runs import fill
from tests.study.tiny_study import describe, plan_of, write_project

METRIC = "val/task_loss"
CONFIG: dict[str, Any] = {
    "seed_everything": 0,
    "data": {"batch_size": 8, "root": "data/shards/scenes", "seed": 0},
    "model": {"losses": {"router_z": {"weight": 0.001}}, "optimizer": {"init_args": {"lr": 0.01}}},
    "trainer": {"max_steps": 4, "logger": {"init_args": {"run_name": "x"}}},
}


def config(seed: int = 0, **dotted: object) -> dict[str, str]:
    """Return params as a run logs them; `data__batch_size=9` sets data.batch_size."""
    leaves = flatten(CONFIG) | {"seed_everything": str(seed), "data.seed": str(seed)}
    for name, value in dotted.items():
        key = name.replace("__", ".")
        leaves = {k: v for k, v in leaves.items() if not k.startswith(f"{key}.")} | flatten({key: value})
    return leaves


def row(number: int, params: dict[str, str], status: str = "FINISHED", name: str = "", **tags: str) -> RunRow:
    run_id = f"{number:032x}"
    return RunRow(run_id, name or f"run{number}", status, "1", "file:///a", 1000, 11_000, tags, params, {})


def series_of(*finals: float) -> dict[str, Series]:
    return {METRIC: Series((0, *range(4, 4 + len(finals))), (7.0, *finals))}


def compared(runs: list[RunRow], finals: list[dict[str, Series]], rules: Rules | None = None) -> StudyResult:
    series = {run.run_id: one for run, one in zip(runs, finals, strict=True)}
    comparison, results = comparison_of_runs(read_runs(runs), series, rules or Rules(METRIC))
    return compare_arms(comparison, dict.fromkeys((arm.name for arm in comparison.arms), None), results)


def two_by_two(**changed: object) -> list[RunRow]:
    """Return seeds 0 and 1 of what CONFIG says, and of it with changes."""
    return [
        row(1, config(0), name="plain-seed0"),
        row(2, config(0, **changed)),
        row(3, config(1), name="plain-seed1"),
        row(4, config(1, **changed)),
    ]


ENDS = [series_of(5.0), series_of(4.0), series_of(6.0), series_of(5.5)]


def test_a_rule_finds_runs_that_did_not_learn() -> None:
    """From 7, plain ends at 5 and 6; the other arm goes all of this way, and then a tenth of it."""
    ends = [series_of(5.0), series_of(5.0), series_of(6.0), series_of(6.9)]
    rules = Rules(METRIC, did_not_learn={"share_of_healthy": "0.5"})
    result = compared(two_by_two(**{"model.depth": 9}), ends, rules)
    assert result.comparison.did_not_learn is not None
    assert result.comparison.did_not_learn.healthy == result.comparison.baseline
    assert [(arm.finished, arm.not_learned) for arm in result.arms] == [(2, 0), (1, 1)]
    assert compared(two_by_two(**{"model.depth": 9}), ends).arms[1].not_learned == 0  # without a rule none is judged


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"share_of_helthy": "0.5"}, "--did_not_learn:1: share_of_helthy: unknown key.* did you mean 'share_of_health"),
        ({"share_of_healthy": "2"}, "--did_not_learn:1: share_of_healthy: expected a number above 0, at most 1"),
        ({"share_of_healthy": "0.5", "healthy": "nobody"}, "--did_not_learn:2: healthy: got 'nobody'"),
    ],
)
def test_a_wrong_rule_is_refused(rule: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        compared(two_by_two(**{"model.depth": 9}), ENDS, Rules(METRIC, did_not_learn=rule))


@pytest.fixture(scope="module")
def filled(migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, str]:
    """A study of 3 arms x 3 seeds, ended, in MLflow with its params."""
    folder = tmp_path_factory.mktemp("filled")
    shutil.copyfile(migrated_database, folder / "mlflow.db")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    (folder / "data.yaml").write_text(yaml.safe_dump({"data": {"batch_size": 20, "seed": "${seed_everything}"}}))
    arms = {"baseline": None, "fast": {"model.speed": 0.9}, "skewed": {"model.skew": 0.3}}
    study = {"arms": arms, "seeds": [0, 1, 2], "base": ["base.yaml", "data.yaml"], "decide": {"within": 0.01}}
    plan = plan_of(write_project(folder, uri, study))
    fill(plan, uri, num_points=12)
    return plan, uri


def of_store(uri: str, words: list[str], rules: Rules) -> StudyResult:
    runs = read_runs(choose_runs(uri, words))
    refuse_unchecked(runs)
    comparison, results = comparison_of_runs(runs, metric_series(uri, [one.row.run_id for one in runs]), rules)
    return compare_arms(comparison, {arm.name: describe({}) for arm in comparison.arms}, results)


def test_a_studys_runs_give_the_numbers_of_its_report(filled: tuple[Plan, str]) -> None:
    plan, uri = filled
    own = collect_results(plan, read_ledger(plan), uri)
    result = of_store(uri, ["sweep=tiny,role=arm"], Rules(METRIC, within=0.01, correction="none"))
    assert [arm.effect.mean is not None for arm in result.arms if arm.effect] == [True, True]

    def records(one: StudyResult) -> list[dict[str, object]]:
        # The name is another one, and MLflow's clock starts when the run is made, the ledger's with the process.
        return [record | {"study": "", "seconds": None} for record in make_records(one)["arms"]]

    assert records(result) == records(own)
    for mine, study in zip(report_tables(result), report_tables(own), strict=True):
        if mine.title != "Models and cost":  # it has the time of a run
            assert (mine.title, mine.rows, mine.notes) == (study.title, study.rows, study.notes)
    # Without its tag an arm is what its configuration is.
    bare = [dataclasses.replace(one, tags={"seed": one.tags["seed"]}) for one in choose_runs(uri, ["sweep=tiny"])]
    runs = read_runs(bare)
    comparison, results = comparison_of_runs(
        runs, metric_series(uri, [one.run_id for one in bare]), Rules(METRIC, within=0.01, correction="none")
    )
    assert [arm.name for arm in comparison.arms] == ["baseline", "speed=0.9", "skew=0.3"]
    again = compare_arms(comparison, {arm.name: describe({}) for arm in comparison.arms}, results)
    assert [arm.effect for arm in again.arms] == [arm.effect for arm in own.arms]


def test_runs_are_chosen_by_name_id_and_tags(filled: tuple[Plan, str]) -> None:
    _, uri = filled
    everything = choose_runs(uri, ["sweep=tiny"])
    assert len(everything) == 9
    first = f"{1:032x}"
    # Ids are 31 zeros and a digit: only whole ones are one run's.
    assert [one.run_id for one in choose_runs(uri, [first, "fast-seed1", first])] == [first, f"{5:032x}"]
    assert [one.tags["arm"] for one in choose_runs(uri, ["seed=2,arm=skewed", "seed=2"])] == [
        "skewed", "baseline", "fast",
    ]  # fmt: skip
    for words, told in (
        ("0000", "names 9 runs"),
        ("fast-sed1", "there are fast-seed1"),
        ("beef", "no run in"),
        ("sweep=tny", "has sweep=tny; there are tiny"),
        ("sweeep=tiny", "has a tag 'sweeep'; there are sweep"),
        ("sweep=tiny,", "TAG=VALUE[,TAG=VALUE]"),
        ('it\'s "odd"', "no run in"),
    ):
        with pytest.raises(UserError) as refused:
            choose_runs(uri, [words])
        assert told in str(refused.value)
    with pytest.raises(UserError, match="there are no runs"):
        choose_runs(uri.replace("mlflow.db", "none.db"), ["x"])


def test_arms_without_names_are_named_by_their_differences() -> None:
    result = compared(two_by_two(model__losses__router_z=None), ENDS)
    base, other = result.arms
    assert (base.arm.name, other.arm.name) == ("plain", "router_z=null")
    assert other.effect.differences == pytest.approx((-1.0, -0.5))  # 4 - 5, 5.5 - 6
    assert describe_changes(result) == {"plain": {}, "router_z=null": {"model.losses.router_z": "null"}}
    assert runs_table(result).rows[1] == ("router_z=null", "0: 00000000, 1: 00000000", "model.losses.router_z: null")
    assert other.card is None
    assert (result.comparison.spends, result.complete) == ("4 steps", True)
    many = compared(two_by_two(model__depth=3, model__dim=4, trainer__x=5), ENDS)
    assert many.arms[1].arm.name == "depth=3, dim=4 and 1 more"


def test_arms_can_be_made_by_keys() -> None:
    runs = two_by_two(model__losses__router_z=None)
    names = ["weight:0.001", "null"]
    result = compared(runs, ENDS, Rules(METRIC, by=("model.losses.router_z",), baseline="router_z=null"))
    assert [arm.arm.name for arm in result.arms] == [f"router_z={name}" for name in names]
    assert result.arms[0].effect.differences == pytest.approx((1.0, 0.5))
    tagged = [dataclasses.replace(run, tags={"host": "ab"[i % 2]}) for i, run in enumerate(runs)]
    assert [arm.arm.name for arm in compared(tagged, ENDS, Rules(METRIC, by=("host",))).arms] == ["host=a", "host=b"]
    with pytest.raises(UserError, match=r"no config key and no tag .* did you mean 'model.losses.router_z.weight'"):
        compared(runs, ENDS, Rules(METRIC, by=("model.losses.routr_z",)))


def test_a_difference_that_biases_is_named_with_its_key_and_may_be_declared() -> None:
    runs = two_by_two(data__batch_size=9)
    result = compared(runs, ENDS)
    biased = [one for one in result.unlike if one.weight == "biases"]
    assert [(one.name, one.text) for one in biased] == [("samples per step", "8 (plain); 9 (batch_size=9)")]
    assert "If arms are meant to differ in it, add --by data.batch_size. To compare" in suggest_remedy(result)
    declared = compared(runs, ENDS, Rules(METRIC, by=("data.batch_size",)))
    assert [one.weight for one in declared.unlike] == ["declared"]
    other_order = compared(two_by_two(data__root="elsewhere"), ENDS)
    assert [(one.name, one.weight) for one in other_order.unlike] == [("data order root", "biases")]


def test_remedy_names_the_key_of_a_limit_that_is_the_same_in_all_runs() -> None:
    """Two batches of 8 are other samples than two of 9, although `limit_val_batches` is 2 in both."""
    runs = [
        dataclasses.replace(run, params=run.params | {"trainer.limit_val_batches": "2"})
        for run in two_by_two(data__batch_size=9)
    ]
    result = compared(runs, ENDS, Rules(METRIC, by=("data.batch_size",)))
    assert [one.name for one in result.unlike if one.weight == "biases"] == ["validation samples"]
    assert "add --by data.batch_size --by trainer.limit_val_batches. To compare" in suggest_remedy(result)
    both = Rules(METRIC, by=("data.batch_size", "trainer.limit_val_batches"))
    assert {one.weight for one in compared(runs, ENDS, both).unlike} == {"declared"}


def test_a_ladder_says_which_arms_and_seeds_it_leaves_out() -> None:
    rate = "model__optimizer__init_args__lr"
    rates = ((0.01, (0, 1)), (0.1, (0, 1)), (0.1, (0, 1)), (1.0, (0,)))
    runs = [
        dataclasses.replace(row(10 * place + seed, config(seed, **{rate: lr})), tags={"arm": f"lr{place}"})
        for place, (lr, seeds) in enumerate(rates)
        for seed in seeds
    ]
    result = compared(runs, [series_of(5.0)] * len(runs))
    [table] = [table for table in report_tables(result) if table.title == "Sensitivity to the learning rate"]
    assert table.notes[1:] == (
        "lr: lr2 is left out, because lr1 has the same learning rate.",
        "lr: the sensitivity leaves out seed 1, without a result of lr3.",
    )
    assert table.rows[0][1].endswith("(1 of 2)")


def test_states_come_from_the_study_or_from_the_points() -> None:
    lost = {METRIC: Series((0, 3), (7.0, math.nan))}
    ends = [series_of(5.0), lost, series_of(6.0), series_of(7.5)]
    runs = two_by_two(model__dim=4)
    arm = compared(runs, ends).arms[1]
    assert [run.state.status for run in arm.runs] == [Status.DIVERGED, Status.DIVERGED]  # 7.5 > 7 of the untrained
    assert [run.state.seconds for run in arm.runs] == [10.0, 10.0]
    crashed = [
        runs[0],
        dataclasses.replace(runs[1], status="FAILED"),
        runs[2],
        dataclasses.replace(runs[3], status="RUNNING"),
    ]
    result = compared(crashed, ENDS)
    assert [run.state.status for run in result.arms[1].runs] == [Status.FAILED, Status.RUNNING]
    assert (result.arms[1].crashed, result.complete) == (1, False)
    judged = [
        *runs[:3],
        dataclasses.replace(runs[3], tags={"outcome": "stopped early", "stopped_early/rule": "far behind"}),
    ]
    stopped = compared(judged, ENDS).arms[1]
    assert stopped.verdict is Verdict.STOPPED_EARLY
    assert stopped.finished == 0  # its other seed went to the end, which is no result of a withdrawn arm
    assert "stopped by rule: far behind" in stopped.effect.note
    with pytest.raises(UserError, match="it cannot be the baseline"):
        compared(judged, ENDS, Rules(METRIC, baseline="dim=4"))


def test_runs_lost_in_seeds_of_one_arm_alone_do_not_count_against_it() -> None:
    # Seeds 0 to 2 are in both: there the arm lost one. The baseline lost its seed 3, which the arm never ran.
    lost = {METRIC: Series((4,), (math.nan,))}  # no untrained model whose value could stand for it
    runs = [row(s, config(s)) for s in range(4)] + [row(10 + s, config(s, model__dim=4)) for s in range(3)]
    ends = [*(series_of(5.0 + s / 10) for s in range(3)), lost, *(series_of(4.0 + s / 9) for s in range(2)), lost]
    effect = compared(runs, ends).arms[1].effect
    assert effect.more_lost == 1
    assert (effect.verdict, effect.limit) == (
        Verdict.INCONCLUSIVE,
        "better in the seeds that finished, but this arm lost 1 more than the baseline",
    )


@pytest.mark.parametrize(
    ("change", "rules", "told"),
    [
        (lambda runs: [*runs[:3], dataclasses.replace(runs[3], params={})], Rules(METRIC), "has no seed"),
        (lambda runs: [*runs[:3], dataclasses.replace(runs[1], run_id="f" * 32)], Rules(METRIC), "are both seed 0 of"),
        (lambda runs: [dataclasses.replace(one, tags={"arm": "a"}) for one in runs], Rules(METRIC), "in model.dim"),
        (lambda runs: [runs[0], runs[2]], Rules(METRIC), "all 2 runs belong to arm 'plain'. Add runs of"),
        (lambda runs: runs, Rules(METRIC, baseline="dim=5"), "did you mean 'dim=4'"),
        (lambda runs: runs, Rules("val/tsk_loss"), "did you mean 'val/task_loss'"),
        (lambda runs: runs, Rules("val/accuracy_text"), "has logged no val/accuracy_text"),
    ],
)  # fmt: skip
def test_runs_that_cannot_be_compared_are_refused(change: Any, rules: Rules, told: str) -> None:
    runs = change(two_by_two(model__dim=4))
    with pytest.raises(UserError) as refused:
        compared(runs, ENDS[: len(runs)], rules)
    assert told in str(refused.value)


def test_a_run_without_configuration_is_refused_unless_unfair() -> None:
    with pytest.raises(UserError, match="has logged no configuration"):
        refuse_unchecked(read_runs([row(1, {}, seed="0", arm="a")]))


def test_arms_of_two_studies_are_not_one() -> None:
    runs = two_by_two(model__dim=4)
    tagged = [
        dataclasses.replace(run, tags={"arm": "baseline", "sweep": name})
        for run, name in zip(runs, ("one", "two", "one", "two"), strict=True)
    ]
    assert [arm.arm.name for arm in compared(tagged, ENDS).arms] == ["one/baseline", "two/baseline"]


@pytest.mark.usefixtures("unrendered")
def test_a_report_takes_the_place_of_a_report_alone(filled: tuple[Plan, str], tmp_path: Path) -> None:
    plan, uri = filled
    result = of_store(uri, ["sweep=tiny"], Rules(METRIC))
    folder = tmp_path / "report"
    refuse_other_folder(folder)
    write_report(make_report(describe_origin(plan, result), result), folder)
    refuse_other_folder(folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"'notes\.txt', which is not part of a report"):
        refuse_other_folder(folder)
