"""Wilcoxon's test and the sign test."""

import itertools

import numpy as np
import pytest
from scipy import stats

from lightning_moevlm.study.statistics.effects import compare_paired
from lightning_moevlm.study.statistics.intervals import Interval, sign_interval, wilcoxon_interval
from lightning_moevlm.study.statistics.paired_tests import least_seeds, paired_p, two_sided_p
from lightning_moevlm.study.statistics.verdict import Rule, Verdict


def test_wilcoxon_by_hand():
    # Six seeds, all worse: of 2^6 = 64 sign patterns one is as extreme on this side, so p = 2 / 64.
    differences = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    assert two_sided_p("wilcoxon", differences) == pytest.approx(2 / 64)
    # At n = 6 only T = 0 (p = 1/64 <= 0.025) may be left out: the interval is the whole range of the 21 pair means.
    assert wilcoxon_interval(differences, 0.05) == Interval(1.0, 6.0, "wilcoxon")
    # n = 7: T <= 2 has 1 + 1 + 1 of 128 patterns, 0.0234 <= 0.025, T <= 3 has 5: three pair means are left out at each
    # end. Of 1 .. 7 they are 1, 1.5, 2 and 2 (1 and 3, 2 and 2), so the fourth would be 2; the third is 2.
    assert wilcoxon_interval((*differences, 7.0), 0.05) == Interval(2.0, 6.0, "wilcoxon")
    assert wilcoxon_interval(differences[:5], 0.05) is None


def test_sign_test_by_hand():
    # Seven of eight worse: P(7 or 8 of 8) = 9 / 256, two-sided 18 / 256.
    differences = (-1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
    assert two_sided_p("sign", differences) == pytest.approx(18 / 256)
    # P(0 of 8) = 1/256, P(at most 1) = 9/256 = 0.035 > 0.025: only the range itself holds the median in 99 %.
    assert sign_interval(differences, 0.05) == Interval(-1.0, 8.0, "sign")
    # n = 9: P(at most 1) = 10/512 = 0.0195 <= 0.025: the second least and greatest.
    assert sign_interval((*differences, 9.0), 0.05) == Interval(2.0, 8.0, "sign")
    assert two_sided_p("sign", (0.0, 0.0)) is None  # nothing has a sign


def test_wilcoxon_with_ties_and_zeros_is_exact():
    # Six equal differences: one of 64 patterns of signs is as extreme on this side. The normal approximation says
    # 0.0143, which at alpha = 0.02 would be a false alarm.
    assert two_sided_p("wilcoxon", (0.5,) * 6) == pytest.approx(2 / 64)
    # A difference of 0 has no sign: five are left, which cannot be rarer than 2 / 32 (approximated: 0.042).
    assert two_sided_p("wilcoxon", (0.0, 1.0, 1.0, 2.0, 3.0, 4.0)) == pytest.approx(2 / 32)
    # Sizes 1, 1, 2 have the ranks 1.5, 1.5, 3; +, -, + have the sum 4.5, as much as or less than 4.5, 4.5, 6 of the
    # eight sums 0, 1.5, 1.5, 3, 3, 4.5, 4.5, 6: 3 / 8, two-sided 3 / 4.
    assert two_sided_p("wilcoxon", (1.0, -1.0, 2.0)) == pytest.approx(3 / 4)


@pytest.mark.parametrize("differences", list(itertools.product((-2.0, -1.0, 0.0, 1.0), repeat=4))[9:90:9])
def test_wilcoxon_agrees_with_every_pattern_of_signs(differences):
    kept = [d for d in differences if d]
    ranks = stats.rankdata(np.abs(kept))
    sums = [sum(rank for rank, is_up in zip(ranks, up, strict=True) if is_up) for up in _patterns(len(kept))]
    seen = sum(rank for rank, d in zip(ranks, kept, strict=True) if d > 0)
    tails = np.mean([one >= seen for one in sums]), np.mean([one <= seen for one in sums])
    assert two_sided_p("wilcoxon", differences) == pytest.approx(min(1.0, 2 * min(tails)))


def _patterns(n: int):
    return itertools.product((False, True), repeat=n)


def test_ties_of_a_rank_test_are_no_repetitions():
    # Accuracies in steps: the second least and the second greatest of nine differences are the same.
    arm, zero = dict(enumerate((1.0,) + 7 * (2.0,) + (3.0,))), dict.fromkeys(range(9), 0.0)
    effect = compare_paired(arm, zero, tuple(range(9)), Rule("higher", 0.05, "sign"))
    assert effect.interval == Interval(2.0, 2.0, "sign")
    assert (effect.verdict, effect.note) == (Verdict.HELPS, "")
    # The same but for rounding is the same to a test of ranks too.
    arm = {seed: 0.3 + 1e-17 * seed for seed in range(6)} | {0: 0.1 + 0.2}
    effect = compare_paired(arm, zero, tuple(range(6)), Rule("higher", 0.05, "wilcoxon"))
    assert effect.note == "all 6 seeds give exactly the same difference, as repetitions would"


@pytest.mark.parametrize("test", ["wilcoxon", "sign"])
def test_rank_tests_need_six_seeds(test):
    assert least_seeds(test, 0.05) == 6
    arm = {s: -1.0 - s / 10 for s in range(6)}
    zero = dict.fromkeys(range(6), 0.0)
    rule = Rule("lower", 0.05, test)
    assert compare_paired(arm, zero, tuple(range(6)), rule).verdict is Verdict.HELPS
    five = compare_paired(arm, zero, tuple(range(5)), rule)
    assert (five.verdict, five.note) == (Verdict.INCONCLUSIVE, "5 seeds give no interval; at least 6 are needed")
    assert (five.p_sign, five.p_wilcoxon) == (None, None)
    assert five.p_t == paired_p(five.differences)
