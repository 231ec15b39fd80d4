"""Paired effects against numbers worked out by hand."""

import math

import numpy as np
import pytest

from lightning_moevlm.study.effects import (
    Interval,
    Lost,
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
    ("interval", "direction", "more_lost", "verdict"),
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
        (Interval(1, 2, "t"), "lower", -1, Verdict.INCONCLUSIVE),  # the baseline's survivors only
        (Interval(-2, -1, "t"), "higher", -1, Verdict.INCONCLUSIVE),
        (Interval(1, 2, "t"), "higher", -1, Verdict.BETTER),
        (Interval(-1, -1, "t"), "lower", 0, Verdict.INCONCLUSIVE),  # seeds that repeat nothing
    ],
)
def test_decide(interval, direction, more_lost, verdict):
    assert decide(interval, 3, direction, more_lost)[0] is verdict


def test_seeds_that_change_nothing_are_no_repetitions():
    # 0.1 three times has a computed standard deviation above 0, the true one is 0.
    effect = paired_effect({0: 0.9, 1: 0.9, 2: 0.9}, {0: 1.0, 1: 1.0, 2: 1.0}, (0, 1, 2), "lower", 0.05)
    assert effect.interval.width == 0
    assert effect.verdict is Verdict.INCONCLUSIVE
    assert effect.note == "all 3 seeds give exactly the same difference: are they repetitions?"
    assert (effect.p_value, effect.seeds_needed) == (None, None)


def test_power_against_published_value():
    # G*Power / Cohen: d = 0.5, n = 34 pairs, alpha = 0.05 two-sided -> power 0.808; n = 33 -> 0.795.
    assert power(0.5, 34, 0.05) == pytest.approx(0.808, abs=1e-3)
    assert power(0.5, 33, 0.05) == pytest.approx(0.795, abs=1e-3)


def test_seeds_needed_is_the_least_n():
    # Mean 0.5 and s = 1 exactly: the same d = 0.5 as above.
    assert seeds_needed((-0.5, 0.5, 1.5), 0.05) == 34
    assert seeds_needed((1.0, 0.0, -1.0), 0.05) is None  # no effect, no number of seeds shows it
    assert seeds_needed((1.0, 0.001, -0.999), 0.05) is None  # beyond 1,000
    assert seeds_needed((0.4, 0.6), 0.05) is None  # two numbers do not tell a spread
    assert seeds_needed((1.0, 1.0, 1.0), 0.05) is None


@pytest.mark.parametrize("size", [5.0, 40.0, 1e3, 1e6, 1e12])
def test_huge_effects_need_few_seeds(size):
    assert 0.99 < power(size, 1_000, 0.05) <= 1.0
    assert seeds_needed((size - 1, size, size + 1), 0.05) in (2, 3)


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
    assert effect.note == "no seed has a finite result in both arms; 1 of 1 seeds left out"
    effect = paired_effect({0: math.nan}, {0: 1.0}, (0,), "lower", 0.05, arm_lost=Lost(diverged=1))
    assert effect.note == (
        "no seed has a finite result in both arms; 1 of 1 seeds left out; every run of this arm diverged"
    )


def test_survivors_alone_do_not_make_an_arm_better():
    arm, baseline = {0: 1.0, 1: 1.02, 2: math.nan}, {0: 2.0, 1: 2.01, 2: 2.02}
    assert paired_effect(arm, baseline, (0, 1, 2), "lower", 0.05).verdict is Verdict.BETTER
    effect = paired_effect(arm, baseline, (0, 1, 2), "lower", 0.05, Lost(diverged=1))
    assert effect.verdict is Verdict.INCONCLUSIVE
    assert effect.note == (
        "ahead where it survives, but it lost 1 more than the baseline; 1 of 3 seeds left out; "
        "1 run of this arm diverged"
    )


@pytest.mark.parametrize(("lost", "what"), [(Lost(diverged=1), "diverged"), (Lost(crashed=1), "crashed")])
def test_survivors_of_the_baseline_do_not_make_an_arm_worse(lost, what):
    arm, baseline = {0: 2.0, 1: 2.01, 2: 2.02}, {0: 1.0, 1: 1.02}
    assert paired_effect(arm, baseline, (0, 1, 2), "lower", 0.05).verdict is Verdict.WORSE
    effect = paired_effect(arm, baseline, (0, 1, 2), "lower", 0.05, baseline_lost=lost)
    assert effect.verdict is Verdict.INCONCLUSIVE
    assert "that lost 1 more than this arm" in effect.note
    assert effect.note.endswith(f"1 of 3 seeds left out; 1 run of the baseline {what}")


def test_losses_are_told_although_they_do_not_limit_the_verdict():
    arm, baseline = {0: 1.0, 1: 1.02, 2: math.nan}, {0: 2.0, 1: 2.01}
    effect = paired_effect(arm, baseline, (0, 1, 2), "lower", 0.05, Lost(diverged=1), Lost(crashed=1))
    assert effect.verdict is Verdict.BETTER
    assert effect.note == "1 of 3 seeds left out; 1 run of this arm diverged; 1 run of the baseline crashed"
    effect = paired_effect(arm, {}, (0, 1, 2), "lower", 0.05, Lost(diverged=1), Lost(diverged=3))
    assert effect.note.endswith("1 run of this arm diverged; every run of the baseline diverged")


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
