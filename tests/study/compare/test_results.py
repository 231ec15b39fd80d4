"""From planned runs and what they logged to effects of factors, ladders and guards, through real study files."""

import dataclasses
import math
import re

import pytest
import yaml

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.compare.collect_results import compare_arms
from lightning_moevlm.study.compare.collect_results import to_result as result_of_run
from lightning_moevlm.study.compare.results import mean_of
from lightning_moevlm.study.report.result_records import make_records
from lightning_moevlm.study.report.sentences import describe_arm, describe_learning
from lightning_moevlm.study.report.tables.report_tables import report_tables
from lightning_moevlm.study.report.tables.stability_tables import equal_budget_table, sensitivity_table
from lightning_moevlm.study.report.tables.table import format_signed
from lightning_moevlm.study.run.ledger import RunState, Status
from lightning_moevlm.study.statistics.outcomes.survival import Survival
from lightning_moevlm.study.statistics.verdict import Verdict
from lightning_moevlm.tracking.read.series import Series
from tests.study.tiny_study import describe, plan_of, write_project

FACTORS = {
    "skew": {"on": {"model.skew": 0.9}},
    "speed": {"on": {"model.speed": 0.9}},
}
NOISE = {0: 0.010, 1: -0.012, 2: 0.008}


def to_result(
    tmp_path, study, finals, drop=lambda run: 0.1, more=lambda run: {}, crashed=lambda run: False, cards=None
):
    """Compare runs that ended at finals(run), diverged where that is None; more: series beside or instead."""
    file = write_project(tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}", {"seeds": [0, 1, 2]} | study)
    written = yaml.safe_load(file.read_text())
    kept = {key: value for key, value in written.items() if value is not None}
    file.write_text(yaml.safe_dump(kept, sort_keys=False))
    plan = plan_of(file)
    results = []
    for run in plan.runs:
        final = finals(run)
        series = {
            "val/task_loss": Series((0, 4), (7.0, 9.0 if final is None else final)),
            "drop_rate/block1/text": Series((4,), (drop(run),)),
        } | more(run)
        status = Status.DIVERGED if final is None else Status.FINISHED
        state = RunState(Status.FAILED if crashed(run) else status, run_id=run.name)
        results.append(result_of_run(run, state, series))
    return compare_arms(plan.comparison, cards or plan.cards, results)


def test_factors_of_a_designed_study(tmp_path):
    def final(run):
        model = run.resolved["model"]
        fast, skewed = model["speed"] == 0.9, model["skew"] == 0.9
        return 5.0 + run.seed - (2.0 + NOISE[run.seed]) * fast - NOISE[run.seed] * skewed

    result = to_result(tmp_path, {"arms": None, "factors": FACTORS, "design": "factorial"}, final)
    effects = {one.name: one.effect for one in result.factors}
    assert list(effects) == ["skew", "speed", "skew x speed"]
    assert effects["speed"].differences == pytest.approx((-2.010, -1.988, -2.008))
    assert effects["speed"].verdict is Verdict.HELPS
    assert effects["skew"].verdict is Verdict.INCONCLUSIVE
    assert effects["skew x speed"].differences == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)
    table = next(table for table in report_tables(result) if table.title.startswith("Main effects"))
    assert [row[0] for row in table.rows] == ["skew", "speed", "skew x speed"]
    assert [record["name"] for record in make_records(result)["factors"]] == ["skew", "speed", "skew x speed"]


@pytest.mark.parametrize(("flops", "told"), [(11_900_000, "alike"), (13_700_000, "+14.2 % of 12 M (fast)")])
def test_arms_that_compute_more_are_not_called_alike(tmp_path, flops, told):
    arms = {"baseline": None, "fast": {"model.speed": 0.9}}
    cards = {"baseline": describe({}), "fast": describe({})._replace(active_flops_per_sample=flops)}
    result = to_result(tmp_path, {"arms": arms}, lambda run: 5.0, cards=cards)
    [row] = report_tables(result)[-1].rows
    assert told in row[1] or told in row[2]
    assert (row[0] == "everything compared") is (told == "alike")


def test_learning_rates_of_a_study(tmp_path):
    rates = {"baseline": None} | {f"lr_{rate}": {"model.optimizer.init_args.lr": rate} for rate in (0.01, 0.1, 1.0)}
    ends = {"lr_0.01": 5.0, "lr_0.1": 4.0, "lr_1.0": None, "baseline": 5.0}
    names = {name.replace(".", "_"): end for name, end in ends.items()}
    arms = {name.replace(".", "_"): changes for name, changes in rates.items()}
    result = to_result(tmp_path, {"arms": arms}, lambda run: names[run.arm])
    [ladder] = result.ladders  # the baseline has no learning rate of its own
    # Untrained 7: (5 + 4 + 7) / 3 - 4 = 4/3 in every seed.
    assert ladder.sensitivity.mean == pytest.approx(4 / 3)
    assert ladder.largest_stable == 0.1
    [record] = make_records(result)["learning_rates"]
    assert record["ladder"]["rungs"] == {"0.01": "lr_0_01", "0.1": "lr_0_1", "1.0": "lr_1_0"}
    assert record["stable"] == {"0.01": 3, "0.1": 3, "1.0": 0}
    assert record["total"] == {"0.01": 3, "0.1": 3, "1.0": 3}
    assert any(table.title == "Sensitivity to the learning rate" for table in report_tables(result))


def test_stability_of_a_rate_whose_runs_crashed_is_unknown(tmp_path):
    rates = {"low": 0.001, "middle": 0.01, "high": 0.1}
    arms = {"baseline": None} | {name: {"model.optimizer.init_args.lr": rate} for name, rate in rates.items()}
    for gone, largest in (("high", 0.01), ("middle", 0.001), ("low", None)):
        result = to_result(tmp_path, {"arms": arms}, lambda run: 5.0, crashed=lambda run, gone=gone: run.arm == gone)
        assert result.ladders[0].largest_stable == largest


def test_guard_correction_and_margin_of_the_study_file(tmp_path):
    study = {
        "arms": {"baseline": None, "fast": {"model.speed": 0.9}, "same": {"model.skew": 0.2}},
        "decide": {"correction": "holm", "within": 0.2},
        "guard": [{"metric": "drop_rate/block1/text", "at_most": 0.05}],
    }
    shift = {"baseline": 0.0, "fast": -1.0, "same": 1.0e-3}

    def final(run):
        return 5.0 + run.seed + shift[run.arm] * (1 + NOISE[run.seed])

    result = to_result(tmp_path, study, final, lambda run: 0.3 if run.arm == "fast" else 0.1)
    words = {arm.arm.name: arm.effect.text for arm in result.arms if arm.effect}
    assert words == {"fast": "breaks guard", "same": "no difference within 0.2"}
    [guard] = result.arms[1].effect.guards
    assert guard.worse == pytest.approx(0.2)
    effects = report_tables(result)[0]
    assert describe_arm(result, result.arms[1]).startswith("fast: breaks guard. ")
    assert "p (Holm)" in effects.columns
    assert any("may get worse by at most 0.05" in note for note in effects.notes)
    assert any("±0.2" in note for note in effects.notes)


def test_values_from_before_a_non_finite_loss_are_not_final(tmp_path):
    # Seed 2 of the arm was at 2.0 when it was last validated, at step 2; from step 3 on its loss was no number.
    study = {"arms": {"baseline": None, "fast": {"model.speed": 0.9}}, "also": ["drop_rate/block1/text"]}
    gone = {
        "val/task_loss": Series((0, 2), (7.0, 2.0)),
        "stability/first_nonfinite_step": Series((4,), (3.0,)),
        "drop_rate/block1/text": Series((2,), (0.9,)),
    }

    def is_gone(run):
        return (run.arm, run.seed) == ("fast", 2)

    def final(run):
        return None if is_gone(run) else 5.0 + run.seed - (1 + NOISE[run.seed]) * (run.arm == "fast")

    result = to_result(tmp_path, study, final, more=lambda run: gone if is_gone(run) else {})
    fast = result.arms[1]
    # Seed 2 counts as its untrained model, 7, which the baseline equals there: 5 + 2.
    assert (fast.effect.seeds, fast.effect.failed, fast.effect.differences[2]) == ((0, 1, 2), (2,), 0.0)
    assert fast.effect.survivors == pytest.approx(-(1.010 + 0.988) / 2)
    assert (fast.final.n, fast.learned, fast.untrained.n) == (2, 2, 3)
    assert fast.also["drop_rate/block1/text"].mean == pytest.approx(0.1)
    assert fast.effect.verdict is Verdict.INCONCLUSIVE  # ahead where it survives
    assert fast.effect.note.startswith(
        "this arm failed in 1 of 3 seeds; failed runs count with their capped value; -0.999 [-1.139, -0.8592] in the 2"
    )
    rows = report_tables(result)[0].rows
    assert [row[1] for row in rows] == ["6.0000 ± 1.0000", "4.5010 ± 0.7227 (2 of 3)"]


def test_a_mean_of_survivors_shows_their_number(tmp_path):
    rates = {"baseline": None, "lr_low": {"model.optimizer.init_args.lr": 0.1}}
    rates["lr_high"] = {"model.optimizer.init_args.lr": 1.0}
    study = {"arms": rates}

    def costs(run):
        steps = (0, 2) if (run.arm, run.seed) == ("lr_high", 1) else (0, 4)
        return {
            "throughput/samples_per_second": Series((2, 4), (10.0, 10.0)),
            "val/task_loss": Series(steps, (7.0, 5.0)),
        }

    # The configurations of this tiny study tell no batch size.
    result = to_result(tmp_path, study | {"base": ["base.yaml"]}, lambda run: 5.0, more=costs)
    arms = [dataclasses.replace(arm, equal={"tokens": mean_of([5.0, 5.0, None])}) for arm in result.arms]
    short = dataclasses.replace(result, arms=tuple(arms), budgets={"tokens": 100.0})
    assert {row[1] for row in equal_budget_table(short).rows} == {"5.0000 ± 0.0000 (2 of 3)"}
    ladder = dataclasses.replace(result.ladders[0], sensitivity=mean_of([1.0]))
    table = sensitivity_table(dataclasses.replace(result, ladders=(ladder,)))
    assert table.rows[0][1] == "1.0000 (1 of 3)"
    assert sensitivity_table(result).rows[0][1] == "0.0000 ± 0.0000"


def test_runs_that_never_validated_the_untrained_model(tmp_path):
    study = {"arms": {"baseline": None, "fast": {"model.speed": 0.9}}}
    late = {"val/task_loss": Series((2, 4), (3.0, 3.1))}
    result = to_result(tmp_path, study, lambda run: 3.1, more=lambda run: late)
    assert [arm.untrained for arm in result.arms] == [None, None]
    assert describe_learning(result).startswith("No run has logged validation task loss of its untrained model")
    table = next(table for table in report_tables(result) if table.title == "Has anything been learned?")
    assert [(row[1], row[-1]) for row in table.rows] == [("–", "–")] * 2


def test_a_withdrawn_arm_has_no_share_of_stable_runs(tmp_path):
    # Seed 0 diverged before the rule stopped the arm; the other two might have done anything.
    study = {
        "arms": {"baseline": None, "worse": {"model.speed": 0.9}},
        "futility_stop": {"at_step": 2, "worse_by": 0.5},
    }

    def curve(run):
        return {"val/task_loss": Series((0, 2, 4), (7.0, 8.0 if run.arm == "worse" else 5.0, 9.0))}

    result = to_result(tmp_path, study, lambda run: None if (run.arm, run.seed) == ("worse", 0) else 5.0, more=curve)
    assert result.arms[1].verdict is Verdict.STOPPED_EARLY
    assert result.arms[1].stability.p is None
    table = next(table for table in report_tables(result) if table.title == "Stability")
    assert [row[1:4] for row in table.rows] == [("3/3", "0.29 to 1.00", "–"), ("–", "–", "–")]


def test_seeds_are_asked_for_only_where_more_would_help(tmp_path):
    # Differences -1.0, -1.1, -1.2: shown by two seeds with 80 % power, and still inconclusive for what was lost.
    study = {"arms": {"baseline": None, "fast": {"model.speed": 0.9}}, "seeds": [0, 1, 2, 3]}

    def final(run):
        shift = -(1 + run.seed / 10) * (run.arm == "fast")
        return None if (run.arm, run.seed) == ("fast", 3) else 5.0 + run.seed + shift

    gone = {"val/task_loss": Series((4,), (math.nan,))}  # no value of the untrained model that could stand for it
    result = to_result(tmp_path, study, final, more=lambda run: gone if final(run) is None else {})
    effect = result.arms[1].effect
    assert effect.verdict is Verdict.INCONCLUSIVE
    assert effect.seeds_needed <= len(effect.seeds)
    assert "seeds would show" not in describe_arm(result, result.arms[1])


def test_the_report_of_a_fraction_lists_its_aliases(tmp_path):
    third = {"third": {"on": {"model.seconds_per_step": 0.0}}}
    design = {"fractional_factorial": {"generators": {"third": ["skew", "speed"]}}}
    study = {"arms": None, "factors": FACTORS | third, "design": design}
    result = to_result(tmp_path, study, lambda run: 5.0 + NOISE[run.seed])
    table = next(table for table in report_tables(result) if table.title.startswith("Main effects"))
    assert "aliased: skew = -speed*third." in table.notes


@pytest.mark.parametrize(
    ("difference", "text"),
    [(0.0, "+0.0000"), (-0.25, "-0.2500"), (-3.2e-5, "-3.2e-05"), (4.4e-4, "+0.00044"), (1.5e30, "+1.5e+30")],
)
def test_a_small_difference_is_not_printed_as_0(difference, text):
    assert format_signed(difference) == text


def test_a_factor_of_a_study_does_not_help_over_its_survivors(tmp_path):
    def final(run):
        fast, skewed = run.resolved["model"]["speed"] == 0.9, run.resolved["model"]["skew"] == 0.9
        return None if fast and run.seed == 2 else 5.0 + run.seed - (2.0 + NOISE[run.seed]) * fast - 1e-3 * skewed

    gone = {"val/task_loss": Series((0, 4), (7.0, math.nan))}
    study = {"arms": None, "factors": FACTORS, "design": "factorial"}
    result = to_result(tmp_path, study, final, more=lambda run: gone if final(run) is None else {})
    speed = next(one.effect for one in result.factors if one.name == "speed")
    # Two of two runs with it on count as untrained, 7, which is what the runs with it off ended at.
    assert (speed.failed, speed.more_lost, speed.verdict) == ((2,), 0, Verdict.INCONCLUSIVE)
    assert speed.differences[2] == pytest.approx(0.0, abs=1e-3)
    assert speed.survivors == pytest.approx(-2.0 - (0.010 - 0.012) / 2)
    assert speed.note.startswith(
        "runs with it on failed in 1 of 3 seeds; failed runs count with their capped value; -1.999"
    )
    unknown = {"val/task_loss": Series((4,), (math.nan,))}
    result = to_result(tmp_path, study, final, more=lambda run: unknown if final(run) is None else {})
    speed = next(one.effect for one in result.factors if one.name == "speed")
    assert (speed.interval.high < 0, speed.more_lost, speed.verdict) == (True, 2, Verdict.INCONCLUSIVE)
    assert speed.note.endswith("1 of 3 seeds left out; 2 of the runs with it on diverged")
    table = next(table for table in report_tables(result) if table.title.startswith("Main effects"))
    assert any("runs with it on lost 2 more" in note for note in table.notes)


SICK = {"arms": {"baseline": None, "sick": {"model.speed": 0.1}, "well": {"model.speed": 0.6}}}


def sick_study(tmp_path, rule, crashed=lambda run: False):
    """Baseline and `well` go from 15 to about 4; `sick` ends at 6.5 with seeds 0 and 1, at 4 with seed 2."""

    def final(run):
        return 6.5 if run.arm == "sick" and run.seed < 2 else 4.0 + NOISE[run.seed] * (2 if run.arm == "well" else 1)

    def curve(run):
        return {"val/task_loss": Series((0, 4), (15.0, final(run))), "val/accuracy_text": Series((4,), (0.5,))}

    return to_result(tmp_path, SICK | {"did_not_learn": rule}, final, more=curve, crashed=crashed)


def test_a_run_that_did_not_learn_is_failed_and_in_no_mean(tmp_path):
    result = sick_study(tmp_path, {"share_of_healthy": 0.8})
    baseline, sick, well = result.arms
    assert [(arm.finished, arm.not_learned, arm.done) for arm in result.arms] == [(3, 0, 3), (1, 2, 3), (3, 0, 3)]
    assert [run.state.status for run in sick.runs] == [*[Status.DID_NOT_LEARN] * 2, Status.FINISHED]
    assert sick.runs[0].state.reason.startswith("val/task_loss ended at 6.5, at 0.77 of the way of baseline")
    assert (sick.final.mean, sick.final.n) == (pytest.approx(4.008), 1)
    assert (sick.stability.survival, sick.stability.p) == (Survival(1, 3), pytest.approx(0.5))
    # In the differences the two count with what they ended at: 6.5 - 4.01 and 6.5 - 3.988.
    assert sick.effect.differences == pytest.approx((2.490, 2.512, 0.0))
    assert sick.effect.failed == (0, 1)
    assert [arm.equal for arm in (baseline, well)] == [{}, {}]
    tables = {table.title: table for table in report_tables(result)}
    stability = tables["Stability"]
    assert stability.rows[1][1:6] == ("1/3", "0.01 to 0.91", "0.5", "–", "2 of 3")
    assert (
        "did not learn: val/task_loss: ended at less than 0.8 of the way of baseline at the same seed."
        in stability.notes
    )
    assert any(note.startswith("sick-seed0: val/task_loss ended at 6.5") for note in stability.notes)
    assert tables["Effect on validation task loss"].rows[1][1] == "4.0080 (1 of 3)"
    assert describe_learning(result).endswith("Runs that diverged or did not learn: sick (2 of 3).")
    records = make_records(result)["arms"]
    assert [record["not_learned"] for record in records] == [0, 2, 0]


def test_without_a_rule_every_finished_run_has_learned(tmp_path):
    assert [arm.finished for arm in sick_study(tmp_path, None).arms] == [3, 3, 3]


def test_a_run_whose_healthy_partner_crashed_is_not_judged(tmp_path):
    rule = {"share_of_healthy": 0.8}
    result = sick_study(tmp_path, rule, crashed=lambda run: (run.arm, run.seed) == ("baseline", 0))
    assert [arm.not_learned for arm in result.arms] == [0, 1, 0]
    assert result.unjudged == tuple(
        f"{arm}-seed0: baseline has no sound result with its seed" for arm in ("sick", "well")
    )
    stability = next(table for table in report_tables(result) if table.title == "Stability")
    assert stability.notes[-1] == f"not judged yet: {result.unjudged[-1]}."


def test_a_rule_that_the_log_cannot_answer_is_refused(tmp_path):
    rule = {"metric": "val/accuracy_text", "no_better_than": "val/majority_text"}
    message = (
        "tiny: did_not_learn cannot judge baseline-seed0: the log has no val/majority_text. Change or remove the rule "
        "in the study file; no run has to be trained again"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        sick_study(tmp_path, rule)


def test_a_guard_is_judged_where_the_baseline_survives(tmp_path):
    """A cure of a baseline that failed with one seed may help; an arm that failed itself lacks its guard."""
    study = {
        "arms": {"baseline": None, "cure": {"model.speed": 0.6}},
        "guard": [{"metric": "drop_rate/block1/text", "at_most": 0.05}],
    }

    def compared(gone):
        def final(run):
            return None if run.arm == gone and run.seed == 2 else 5.0 - (2.0 + NOISE[run.seed]) * (run.arm == "cure")

        [_, cure] = to_result(tmp_path, study, final).arms
        return cure.effect.guards[0]

    assert (compared("baseline").missing, compared("cure").missing) == (0, 1)
