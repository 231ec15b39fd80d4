"""`futility_stop`: the withdrawn arms, their runs, and that no other verdict gets easier by it."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lightning_moevlm.study.compare.collect_results import collect_results
from lightning_moevlm.study.declare.comparison import FutilityStop, Primary
from lightning_moevlm.study.report.tables.report_tables import report_tables
from lightning_moevlm.study.run.ledger import Status, read_ledger
from lightning_moevlm.study.statistics.effects import compare_paired, judge_family
from lightning_moevlm.study.statistics.futility import check_futility, withhold_verdict
from lightning_moevlm.study.statistics.paired_tests import holm
from lightning_moevlm.study.statistics.verdict import Rule, Verdict
from tests.study.refusals import assert_refused
from tests.study.run.test_execute import tracked
from tests.study.tiny_study import sweep, write_project

RULE = FutilityStop(at_step=3, worse_by=0.5)
LOSS, ACCURACY = Primary("val/task_loss", "lower"), Primary("val/accuracy_text", "higher")


def test_an_arm_is_withdrawn_by_its_first_seed_that_is_too_far_behind() -> None:
    """Differences 4.4 - 4.0 = 0.4 and 5.0 - 4.2 = 0.8; only the second is above 0.5."""
    found = check_futility(RULE, LOSS, {0: 4.4, 1: 5.0}, {0: 4.0, 1: 4.2, 2: 9.0}, (0, 1, 2))
    assert found is not None
    assert found.decision == (1, 3, 5.0, 4.2)
    assert dict(found.differences) == {0: pytest.approx(0.4), 1: pytest.approx(0.8)}
    assert found.text == (
        "stopped by rule: val/task_loss at step 3 is 5 with seed 1, worse than the baseline's 4.2 by more than 0.5; at "
        "that step +0.6 on average over 2 seeds, from +0.4 to +0.8; a description, no test"
    )
    assert found.tags["stopped_early/rule"] == "worse than the baseline of its seed by more than 0.5 at step 3"


@pytest.mark.parametrize(
    ("primary", "arm", "baseline"),
    [
        (LOSS, {0: 4.5}, {0: 4.0}),  # exactly 0.5 is not more
        (LOSS, {0: 3.0}, {0: 4.0}),
        (ACCURACY, {0: 0.9}, {0: 0.1}),
        (LOSS, {0: 9.0}, {1: 4.0}),  # another seed is no pair
        (LOSS, {0: math.inf}, {0: 4.0}),  # a divergence
        (LOSS, {}, {}),
    ],
)
def test_others_go_on(primary: Primary, arm: dict[int, float], baseline: dict[int, float]) -> None:
    assert check_futility(RULE, primary, arm, baseline, (0, 1)) is None


def test_higher_can_be_better() -> None:
    assert check_futility(RULE, ACCURACY, {0: 0.1}, {0: 0.9}, (0,)) is not None


def test_a_withdrawn_arm_still_counts_in_the_family() -> None:
    """Holm over two: the smaller p is doubled, although the other arm has none."""
    seeds, rule = tuple(range(6)), Rule("lower", 0.05, "t", "holm")
    plain = compare_paired({s: -0.1 - 0.05 * s for s in seeds}, dict.fromkeys(seeds, 0.0), seeds, rule)
    found = check_futility(RULE, LOSS, {0: 9.0}, {0: 4.0}, seeds)
    assert found is not None
    judged = judge_family({"arm": plain, "gone": withhold_verdict(seeds, rule, found.text)}, rule)
    assert judged["arm"].p_adjusted == pytest.approx(2 * plain.p_value)
    assert judged["gone"].verdict is Verdict.STOPPED_EARLY
    assert (judged["gone"].mean, judged["gone"].p_adjusted) == (None, None)


def test_designs_that_need_every_arm_refuse_it(tmp_path: Path) -> None:
    file = tmp_path / "crossed.yaml"
    file.write_text(
        "question: Does it?\n"
        "base: [conf/quickstart.yaml]\n"
        "factors: {z: {off: {model.losses.router_z: null}}, lb: {off: {model.losses.load_balance: null}}}\n"
        "design: factorial\n"
        "seeds: [0]\n"
        "budget: {max_steps: 10}\n"
        "primary: {metric: val/task_loss}\n"
        "futility_stop: {at_step: 3, worse_by: 1}\n"
    )
    assert_refused(file, 8, ["a factorial design needs every arm to its end", "one_in, leave_one_out or `arms`"])


@pytest.mark.slow
def test_a_sweep_stops_the_withdrawn_arm_and_gives_it_no_verdict(tmp_path: Path, uri: str) -> None:
    study = {
        "arms": {"baseline": None, "far": {"model.worse": 2.0}, "near": {"model.worse": 0.1}},
        "budget": {"max_steps": 40},
        "futility_stop": {"at_step": 3, "worse_by": 1.0},
    }
    file = write_project(tmp_path, uri, study, model={"seconds_per_step": 0.25})
    plan, experiment, tally, _ = sweep(file, jobs=6)
    assert (tally.started, tally.stopped) == (6, "")
    states = {run.name: state for run, state in read_ledger(plan)}
    for name, state in states.items():
        steps = [point.step for point in experiment.history(str(state.run_id), "val/task_loss")]
        if name.startswith("far"):
            assert state.status is Status.STOPPED
            assert state.reason.startswith("val/task_loss at step 3 is ")
            assert 3 <= steps[-1] < 40
        else:
            assert state.status is Status.FINISHED
            assert steps[-1] == 40
    tags = [row.tags for row in tracked(experiment) if row.tags["arm"] == "far"]
    assert [(one["outcome"], one["stopped_early/step"]) for one in tags] == [("stopped early", "3")] * 2
    # baseline at step 3 with seed 0: 4 + 3 exp(-0.5 x 3) + 0.01 sin(5.5)
    assert float(tags[0]["stopped_early/baseline"]) == pytest.approx(4 + 3 * math.exp(-1.5) + 0.01 * math.sin(5.5))
    assert float(tags[0]["stopped_early/value"]) == pytest.approx(float(tags[0]["stopped_early/baseline"]) + 2.0)

    assert sweep(file)[2].started == 0
    result = collect_results(plan, read_ledger(plan), uri)
    arms = {arm.arm.name: arm for arm in result.arms}
    assert result.complete
    assert arms["far"].verdict is Verdict.STOPPED_EARLY
    assert (arms["far"].final, arms["far"].finished) == (None, 0)
    assert "at that step +2 on average over 2 seeds" in arms["far"].effect.note
    assert arms["near"].effect.mean == pytest.approx(0.1)
    shown = [cell for table in report_tables(result) for row in table.rows for cell in row]
    assert "stopped early" in shown


def simulated(studies: int, arms: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return differences of arms that do nothing, in the middle and at the end, correlated by 0.8."""
    rng = np.random.default_rng(11)
    middle, rest = (rng.normal(size=(studies, arms + 1, n)) for _ in range(2))
    end = 0.8 * middle + 0.6 * rest
    return middle[:, 1:] - middle[:, :1], end[:, 1:] - end[:, :1]


def p_value(differences: np.ndarray) -> float:
    """Two-sided p of the paired t-test; 1 where there are too few pairs."""
    n = len(differences)
    if n < 2:
        return 1.0
    return float(2 * stats.t.sf(abs(differences.mean()) / (differences.std(ddof=1) / math.sqrt(n)), n - 1))


@pytest.mark.slow
@pytest.mark.parametrize("n", [4, 8])
def test_the_family_wise_error_stays_under_alpha(n: int) -> None:
    """Five arms that do nothing; the rule withdraws some of them.

    With it, what is told is a part of what is told without it, study by study. Dropping the stopped seeds alone, as a
    pruner does, errs more often.
    """
    studies, alpha, worse_by = 4_000, 0.05, 1.5
    with_rule = without_rule = pruned = withdrawn = 0

    def told(p_values: list[float]) -> set[str]:
        return {name for name, p in holm({str(i): p for i, p in enumerate(p_values)}).items() if p <= alpha}

    for middle, end in zip(*simulated(studies, arms=5, n=n), strict=True):
        stopped = (middle > worse_by).any(axis=1)
        plain = [p_value(arm) for arm in end]
        with_, without = told([1.0 if gone else p for gone, p in zip(stopped, plain, strict=True)]), told(plain)
        assert with_ <= without
        withdrawn += int(stopped.sum())
        with_rule += bool(with_)
        without_rule += bool(without)
        pruned += bool(told([p_value(arm[early <= worse_by]) for early, arm in zip(middle, end, strict=True)]))
    rates = [count / studies for count in (with_rule, without_rule, pruned, withdrawn)]
    print(f"n={n}: with {rates[0]:.4f}, without {rates[1]:.4f}, pruned {rates[2]:.4f}, {rates[3]:.2f} arms withdrawn")
    assert withdrawn > studies  # the rule acts: more than one arm in five
    assert with_rule / studies <= alpha + 2 * math.sqrt(alpha * (1 - alpha) / studies)
    assert pruned > without_rule


@pytest.mark.slow
def test_whole_verdicts_with_the_rule_are_among_those_without_it() -> None:
    """Not p values alone; arms 0 and 1 do help, so that there is something to tell."""
    seeds, rule, early = tuple(range(6)), Rule("lower", 0.05, "t", "holm"), FutilityStop(1, 1.5)
    zero = dict.fromkeys(seeds, 0.0)
    told, withdrawn = 0, 0
    for middle, end in zip(*simulated(20, arms=4, n=6), strict=True):
        end[:2] -= 3.0
        plain = {str(i): compare_paired(dict(enumerate(arm)), zero, seeds, rule) for i, arm in enumerate(end)}
        found = {str(i): check_futility(early, LOSS, dict(enumerate(arm)), zero, seeds) for i, arm in enumerate(middle)}
        stopped = {name: withhold_verdict(seeds, rule, one.text) for name, one in found.items() if one is not None}
        words = {name: one.verdict for name, one in judge_family(plain | stopped, rule).items()}
        without = {name: one.verdict for name, one in judge_family(plain, rule).items()}
        for name, word in words.items():
            if word in (Verdict.HELPS, Verdict.HURTS):
                told += 1
                assert word is without[name]
        withdrawn += len(stopped)
    assert told > 0
    assert withdrawn > 0
