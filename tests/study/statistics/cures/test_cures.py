"""Shares undone and verdicts on cures, against numbers worked out by hand."""

import math
from collections.abc import Sequence

import pytest

from lightning_moevlm.study.statistics.cures.cure_effect import CureEffect, CureVerdict, Share, judge_cell, judge_cures
from lightning_moevlm.study.statistics.cures.damage import judge_damage, judge_damages
from lightning_moevlm.study.statistics.cures.share_undone import fieller_interval, share_undone
from lightning_moevlm.study.statistics.outcomes.survival import Final, Survival
from lightning_moevlm.study.statistics.verdict import Rule, Verdict

RULE = Rule("lower", 0.05, correction="holm")
SEEDS = (0, 1, 2)
HEALTHY = (1.0, 1.0, 1.0)
SICK = (2.9, 3.0, 3.1)  # damage 1.9, 2.0, 2.1


def finals(values: Sequence[float | None], failed: Sequence[int] = ()) -> dict[int, Final]:
    return {seed: Final(value, seed in failed) for seed, value in enumerate(values) if value is not None}


def cell(
    cured: Sequence[float | None], sick: Sequence[float | None] = SICK, rule: Rule = RULE, failed: Sequence[int] = ()
) -> CureEffect:
    return judge_cell(finals(HEALTHY), finals(sick), finals(cured, failed), SEEDS, rule)


def share_of(effect: CureEffect) -> Share:
    assert effect.share is not None
    return effect.share


def p_of_t(t: float) -> float:
    """Two-sided p of Student's t with 2 degrees of freedom, whose distribution has a closed form."""
    return 1 - t / math.sqrt(t * t + 2)


def test_fieller_by_hand() -> None:
    damage, undone = (1.9, 2.0, 2.1), (1.8, 2.0, 2.1)
    # Means 2 and 5.9 / 3; s_dd = 0.01, s_ud = 0.015, s_uu = 0.0233333; t^2 / n = 4.302653^2 / 3 = 6.170941.
    # a = 4 - 0.061709, b = 3.933333 - 0.092564, c = 3.867778 - 0.143989; (b -+ sqrt(b^2 - a c)) / a.
    interval = fieller_interval(damage, undone, 0.05)
    assert interval is not None
    assert share_undone(damage, undone) == pytest.approx(5.9 / 6)
    assert (interval.low, interval.high) == (pytest.approx(0.90071, abs=2e-5), pytest.approx(1.04976, abs=2e-5))


def test_each_end_of_the_interval_is_where_the_t_test_turns() -> None:
    damage, undone = (1.9, 2.6, 2.1), (0.3, 0.9, 0.1)
    interval = fieller_interval(damage, undone, 0.05)
    assert interval is not None
    for share in (interval.low, interval.high):
        rest = [u - share * d for u, d in zip(undone, damage, strict=True)]
        mean = sum(rest) / 3
        deviation = math.sqrt(sum((r - mean) ** 2 for r in rest) / 2)
        assert p_of_t(abs(mean) / (deviation / math.sqrt(3))) == pytest.approx(0.05, abs=1e-9)


def test_without_a_damage_that_shows_there_is_no_interval() -> None:
    # Mean 1, s = 1: t = sqrt(3), p = 0.225. The set of shares that are not rejected is not bounded.
    assert fieller_interval((0.0, 1.0, 2.0), (0.0, 1.0, 2.0), 0.05) is None
    assert fieller_interval((1.9, 2.0, 2.1), (1.0, 1.0, 1.0), 0.05) is not None
    assert fieller_interval((-1.9, -2.0, -2.1), (1.0, 1.0, 1.0), 0.05) is None  # the "sick" model is the better one
    assert share_undone((-1.0, 0.5), (0.1, 0.1)) is None
    assert fieller_interval((1.0,), (1.0,), 0.05) is None


@pytest.mark.parametrize(
    ("cured", "verdict", "share"),
    [
        ((1.1, 1.0, 1.0), CureVerdict.CURES, 5.9 / 6),
        ((1.35, 1.42, 1.4), CureVerdict.CURES, 4.83 / 6),  # 0.805: just enough
        ((1.45, 1.42, 1.4), CureVerdict.HELPS, 4.73 / 6),  # 0.788
        ((1.9, 2.0, 2.0), CureVerdict.HELPS, 3.1 / 6),
        ((1.0, 1.6, 0.9), CureVerdict.HELPS, 5.5 / 6),  # its interval begins at 0.42: half is not shown
        ((3.4, 3.5, 3.5), CureVerdict.HARMS, -1.4 / 6),
        ((2.9, 3.05, 3.05), CureVerdict.NONE, 0.0),
        ((2.5, 3.5, 3.0), CureVerdict.UNCLEAR, 0.0),
    ],
)
def test_verdicts(cured: tuple[float, ...], verdict: CureVerdict, share: float) -> None:
    found = cell(cured)
    assert (found.verdict, share_of(found).estimate) == (verdict, pytest.approx(share))


def test_p_values_by_hand() -> None:
    found = share_of(cell((1.1, 1.0, 1.0)))
    # Undone 1.8, 2.0, 2.1: mean 1.966667, s = 0.152753. Less half the damage: 0.85, 1.0, 1.05, s = 0.104083.
    assert found.p_value == pytest.approx(p_of_t(1.966667 / (0.152753 / math.sqrt(3))), rel=1e-4)
    assert found.p_half == pytest.approx(p_of_t(0.966667 / (0.104083 / math.sqrt(3))), rel=1e-4)
    # Undone 0, -0.05, 0.05. Half the damage less that: 0.95, 1.05, 1.0, s = 0.05; with it: 0.95, 0.95, 1.1, s = 0.0866.
    small = share_of(cell((2.9, 3.05, 3.05)))
    assert small.p_small == pytest.approx(p_of_t(1.0 / (math.sqrt(0.0075) / math.sqrt(3))) / 2, rel=1e-4)


def test_higher_is_better_turns_every_sign() -> None:
    rule = Rule("higher", 0.05)
    found = judge_cell(
        finals([-v for v in HEALTHY]), finals([-v for v in SICK]), finals([-1.1, -1.0, -1.0]), SEEDS, rule
    )
    assert (found.share, found.verdict) == (share_of(cell((1.1, 1.0, 1.0))), CureVerdict.CURES)


def test_a_cure_that_changes_nothing() -> None:
    found = cell(SICK)
    assert found.verdict is CureVerdict.NONE
    assert found.note == "exactly as the sick model in all 3 seeds, as if it changed nothing"
    interval = share_of(found).interval
    assert interval.low == pytest.approx(0) == pytest.approx(interval.high)


def test_without_proof_there_is_no_share() -> None:
    found = cell((1.0, 1.1, 1.0), sick=(1.0, 2.0, 3.0))
    assert (found.share, found.verdict) == (None, CureVerdict.UNCLEAR)
    assert found.note == "the illness did not prove itself: no damage is shown"


def test_failed_and_missing_runs_are_said() -> None:
    found = cell((1.1, 1.0, 6.9), failed=[2])
    assert (found.survival, found.verdict) == (Survival(2, 3), CureVerdict.UNCLEAR)
    assert share_of(found).estimate == pytest.approx((1.8 + 2.0 - 3.8) / 6)
    assert found.note == "1 of 3 runs failed and count with their capped value"
    crashed = cell((1.1, 1.0, None))
    assert (crashed.seeds, crashed.lost, crashed.verdict) == ((0, 1), 1, CureVerdict.UNCLEAR)
    both = cell((1.1, 1.0, 1.0), sick=(2.9, 3.0, None))  # of a seed that the sick model lacks, nobody is to blame
    assert (both.lost, both.left_out) == (0, 1)
    assert both.note.endswith("1 of 3 seeds left out")
    # Undone 1.8 and 1.81: better beyond doubt, but the third run crashed, which may be the illness.
    assert cell((1.1, 1.19, None)).limit == "better in the seeds that ended, but 1 of its runs have no result"


def test_holm_over_the_cells() -> None:
    one = cell((1.1, 1.0, 1.0))  # p = 0.0020
    p = share_of(one).p_value
    assert p is not None
    family = {("ill", name): one for name in "abc"} | {("ill", "unknown"): cell((None, None, None))}
    judged = judge_cures(family, RULE)
    # Four cells, of which one has no p and counts with 1: the least p is taken four times.
    assert share_of(judged["ill", "a"]).p_adjusted == pytest.approx(4 * p)
    assert judged["ill", "a"].verdict is CureVerdict.CURES
    many = judge_cures({str(i): one for i in range(30)}, RULE)  # 30 x 0.0020 = 0.06
    assert many["0"].verdict is CureVerdict.UNCLEAR
    assert many["0"].limit == "its interval excludes 0, but p = 0.0601 over the family of cells"
    # p of "nothing" is 0.0116 and of "at most half" 0.0458: of two such cells both still help, and neither cures.
    two = judge_cures(dict.fromkeys("ab", cell((1.0, 1.5, 0.9))), RULE)
    assert (cell((1.0, 1.5, 0.9)).verdict, two["a"].verdict) == (CureVerdict.CURES, CureVerdict.HELPS)
    assert judge_cures({"0": one}, Rule("lower", 0.05)) == {"0": one}


def test_failures_that_may_be_chance_limit_a_family_of_cells() -> None:
    sick = finals(SICK, failed=[0, 1, 2])
    whole = judge_cell(finals(HEALTHY), sick, finals((1.1, 1.0, 1.0)), SEEDS, RULE)
    part = judge_cell(finals(HEALTHY), sick, finals((1.1, 1.0, 3.0), failed=[2]), SEEDS, RULE)
    assert (whole.failures, part.failures) == ((0, 3, 0), (0, 3, 1))
    assert (whole.jump, part.jump) == (0.0, pytest.approx(1.95))
    assert judge_cures({"a": whole, "b": whole}, RULE)["a"].verdict is CureVerdict.CURES
    # One cure failed with one seed of three: that all sick runs failed may be chance, in 2 of 64 cases.
    limited = judge_cures({"a": whole, "b": part}, RULE)["a"]
    assert (limited.verdict, share_of(limited).p_adjusted) == (CureVerdict.UNCLEAR, pytest.approx(4 / 64))


def test_cells_of_an_unproved_illness_are_withheld() -> None:
    judged = judge_cures({"a": cell((1.1, 1.0, 1.0)), "b": cell((1.1, 1.0, 1.0))}, RULE, unproved={"a"})
    assert (judged["a"].share, judged["a"].verdict) == (None, CureVerdict.UNCLEAR)
    assert judged["a"].limit == "the illness did not prove itself: no damage is shown"
    other = share_of(judged["b"])
    assert other.p_adjusted == pytest.approx(2 * (other.p_value or 0))


def test_damage_proves_itself() -> None:
    damage = judge_damage(finals(HEALTHY), finals(SICK, failed=[0, 1]), SEEDS, RULE)
    assert damage.proved and damage.mean == pytest.approx(2.0)
    assert (damage.healthy, damage.sick) == (Survival(3, 3), Survival(1, 3))
    assert damage.note.startswith("sick runs failed in 2 of 3 seeds; failed runs count with their capped value; +2.1")
    # t = 2 / (0.1 / sqrt(3)) = 34.641: p = 0.000833, and 60 such illnesses would need 0.05 / 60.
    assert damage.p_value == pytest.approx(p_of_t(34.6410), rel=1e-4)
    assert judge_damages({"a": damage, "b": damage}, RULE)["a"].p_value == pytest.approx(2 * p_of_t(34.6410), rel=1e-4)
    assert not judge_damage(finals(HEALTHY), finals((1.0, 2.0, 3.0)), SEEDS, RULE).proved
    better = judge_damage(finals(SICK), finals(HEALTHY), SEEDS, RULE)
    assert better.effect.verdict is Verdict.HELPS and not better.proved
    crashed = judge_damage(finals(HEALTHY), finals((2.9, None, 3.1)), SEEDS, RULE)
    assert "1 of the sick runs crashed" in crashed.note


@pytest.mark.parametrize(
    ("stable", "total", "low", "high"), [(0, 3, 0.0, 0.7076), (3, 3, 0.2924, 1.0), (5, 5, 0.4782, 1.0)]
)
def test_exact_interval_of_survivors(stable: int, total: int, low: float, high: float) -> None:
    """All or none of n: the other end is where 0.025 = p^n, as 0.025^(1/3) = 0.2924 and 0.025^(1/5) = 0.4782."""
    assert Survival(stable, total).interval(0.05) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    assert Survival(0, 0).interval(0.05) is None
