"""Paired effects against numbers worked out by hand."""

import math

import numpy as np
import pytest

from lightning_moevlm.study.effects import (
    Interval,
    Verdict,
    bootstrap_interval,
    decide,
    paired_effect,
    paired_p,
    power,
    seeds_needed,
    t_interval,
)


def test_t_interval_and_p_by_hand():
    # d = 1, 2, 3: mean 2, s = 1, n = 3, standard error 1/sqrt(3) = 0.57735; t_{2, 0.975} = 4.30265.
    interval = t_interval((1.0, 2.0, 3.0), alpha=0.05)
    assert interval.low == pytest.approx(2 - 4.30265 * 0.57735, abs=1e-4)
    assert interval.high == pytest.approx(2 + 4.30265 * 0.57735, abs=1e-4)
    # t = 2 / 0.57735 = 3.4641; with 2 degrees of freedom p = 1 - t / sqrt(t^2 + 2) = 1 - 3.4641 / sqrt(14) = 0.07418.
    assert paired_p((1.0, 2.0, 3.0)) == pytest.approx(1 - 3.4641016 / math.sqrt(14), abs=1e-6)


def test_too_few_numbers_give_no_interval():
    assert t_interval((0.3,), 0.05) is None
    assert paired_p((0.3,)) is None
    assert bootstrap_interval((0.3, 0.4), 0.05) is None
    assert seeds_needed((0.3,), 0.05) is None


def test_bootstrap_is_fixed_and_under_covers_at_three():
    differences = (-0.031, -0.024, -0.012)
    first, again = bootstrap_interval(differences, 0.05), bootstrap_interval(differences, 0.05)
    assert first == again
    # A resample of three numbers never leaves their range, while the t interval at n = 3 is far wider.
    assert min(differences) <= first.low < first.high <= max(differences)
    assert t_interval(differences, 0.05).width > 2 * first.width


def test_bootstrap_without_spread():
    assert bootstrap_interval((0.5, 0.5, 0.5), 0.05) == Interval(0.5, 0.5, "bootstrap")
    assert paired_p((0.5, 0.5, 0.5)) is None


@pytest.mark.parametrize(
    ("interval", "direction", "more_diverged", "verdict"),
    [
        (Interval(-2, -1, "t"), "lower", 0, Verdict.BETTER),
        (Interval(-2, -1, "t"), "higher", 0, Verdict.WORSE),
        (Interval(1, 2, "t"), "lower", 0, Verdict.WORSE),
        (Interval(1, 2, "t"), "higher", 0, Verdict.BETTER),
        (Interval(-1, 2, "t"), "lower", 0, Verdict.INCONCLUSIVE),
        (Interval(0, 2, "t"), "lower", 0, Verdict.INCONCLUSIVE),
        (None, "lower", 0, Verdict.INCONCLUSIVE),
        (Interval(-2, -1, "t"), "lower", 1, Verdict.INCONCLUSIVE),  # survivors only
        (Interval(1, 2, "t"), "lower", 1, Verdict.WORSE),
        (Interval(-2, -1, "t"), "lower", -1, Verdict.BETTER),
    ],
)
def test_decide(interval, direction, more_diverged, verdict):
    assert decide(interval, 3, direction, more_diverged)[0] is verdict


def test_power_against_published_value():
    # G*Power / Cohen: d = 0.5, n = 34 pairs, alpha = 0.05 two-sided -> power 0.808; n = 33 -> 0.795.
    assert power(0.5, 34, 0.05) == pytest.approx(0.808, abs=1e-3)
    assert power(0.5, 33, 0.05) == pytest.approx(0.795, abs=1e-3)


def test_seeds_needed_is_the_least_n():
    # Mean 0.5 and s = 1 exactly: the same d = 0.5 as above.
    half = math.sqrt(0.5)
    assert seeds_needed((0.5 - half, 0.5 + half), 0.05) == 34
    assert seeds_needed((1.0, 1.0), 0.05) == 2
    assert seeds_needed((1.0, -1.0), 0.05) is None  # no effect, no number of seeds shows it
    assert seeds_needed((1.0, -0.999), 0.05) is None  # beyond 1,000


def test_paired_effect_pairs_by_seed():
    # Levels differ wildly between seeds; within a seed the arm is 0.1, 0.2 and 0.3 lower.
    baseline = {0: 1.0, 1: 5.0, 2: 9.0}
    arm = {2: 8.7, 0: 0.9, 1: 4.8}
    effect = paired_effect(arm, baseline, (0, 1, 2), "lower", 0.05)
    assert effect.differences == pytest.approx((-0.1, -0.2, -0.3))
    assert effect.mean == pytest.approx(-0.2)
    assert effect.share_better == 1.0
    # s = 0.1: half width 4.30265 * 0.1 / sqrt(3) = 0.24841 > 0.2, so three such seeds are not enough.
    assert effect.interval.method == "t"
    assert (effect.interval.low, effect.interval.high) == pytest.approx((-0.44841, 0.04841), abs=1e-4)
    assert effect.verdict is Verdict.INCONCLUSIVE
    # d = 2: n = 4 has power 0.78, n = 5 has 0.92.
    assert effect.seeds_needed == next(n for n in range(2, 99) if power(2.0, n, 0.05) >= 0.8) == 5


def test_missing_and_non_finite_seeds_are_left_out_and_named():
    effect = paired_effect({0: 1.0, 1: math.nan, 3: 2.0}, {0: 2.0, 1: 1.0, 2: 1.0, 3: 3.5}, (0, 1, 2, 3), "lower", 0.05)
    assert effect.seeds == (0, 3)
    assert effect.left_out == (1, 2)
    assert effect.bootstrap is None
    assert effect.t is not None


def test_no_pair_at_all():
    effect = paired_effect({}, {0: 1.0}, (0,), "lower", 0.05)
    assert effect.mean is None
    assert effect.verdict is Verdict.INCONCLUSIVE
    assert effect.note == "no seed has a finite result in both arms"
    effect = paired_effect({0: math.nan}, {0: 1.0}, (0,), "lower", 0.05, arm_diverged=1)
    assert effect.note == "no seed has a finite result in both arms; 1 runs diverged, 0 of the baseline"


def test_survivors_alone_do_not_make_an_arm_better():
    arm, baseline = {0: 1.0, 1: 1.01, 2: math.nan}, {0: 2.0, 1: 2.01, 2: 2.02}
    assert paired_effect(arm, baseline, (0, 1, 2), "lower", 0.05).verdict is Verdict.BETTER
    effect = paired_effect(arm, baseline, (0, 1, 2), "lower", 0.05, arm_diverged=1)
    assert effect.verdict is Verdict.INCONCLUSIVE
    assert "1 more runs diverged than of the baseline" in effect.note


def test_wider_interval_covers_at_three_seeds():
    """The rule "the wider decides" keeps a null effect's false alarms near alpha; the bootstrap alone does not."""
    rng = np.random.default_rng(1)
    studies = [tuple(rng.normal(size=3)) for _ in range(400)]

    def covers(interval: Interval) -> bool:
        return interval.low <= 0 <= interval.high

    bootstrap = np.mean([covers(bootstrap_interval(d, 0.05)) for d in studies[:60]])
    decided = np.mean(
        [
            covers(paired_effect(dict(enumerate(d)), {0: 0.0, 1: 0.0, 2: 0.0}, (0, 1, 2), "lower", 0.05).interval)
            for d in studies[:60]
        ]
    )
    t = np.mean([covers(t_interval(d, 0.05)) for d in studies])
    assert bootstrap < 0.85
    assert decided >= 0.9
    assert 0.92 <= t <= 0.98
