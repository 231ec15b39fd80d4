"""Paired effects against numbers worked out by hand."""

import math

import numpy as np
import pytest

from lightning_moevlm.study.statistics.effects import Lost, compare_paired, judge_family
from lightning_moevlm.study.statistics.intervals import Interval, bootstrap_interval, interval_of, t_interval
from lightning_moevlm.study.statistics.outcomes.survival import find_jump
from lightning_moevlm.study.statistics.paired_tests import chance_p, format_p, holm, p_outside, paired_p
from lightning_moevlm.study.statistics.power import power, seeds_against_chance, seeds_needed
from lightning_moevlm.study.statistics.verdict import Evidence, Rule, Verdict, decide

LOWER = Rule("lower", alpha=0.05)


def test_t_interval_and_p_by_hand():
    # d = 1, 2, 3: mean 2, s = 1, n = 3, standard error 1/sqrt(3) = 0.57735; t_{2, 0.975} = 4.30265.
    interval = t_interval((1.0, 2.0, 3.0), alpha=0.05)
    assert interval.low == pytest.approx(2 - 4.30265 * 0.57735, abs=1e-4)
    assert interval.high == pytest.approx(2 + 4.30265 * 0.57735, abs=1e-4)
    # t = 2 / 0.57735 = 3.4641; with 2 degrees of freedom p = 1 - t / sqrt(t^2 + 2) = 1 - 3.4641 / sqrt(14) = 0.07418.
    assert paired_p((1.0, 2.0, 3.0)) == pytest.approx(1 - 3.4641016 / math.sqrt(14), abs=1e-6)


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (0.05004, "0.05004"),
        (0.0500000001, "0.0500000001"),
        (0.05, "0.05"),
        (0.04996, "0.05"),
        (1e-9, "1e-09"),
    ],
)
def test_a_printed_p_stays_on_its_side_of_alpha(p, text):
    assert format_p(p, 0.05) == text


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
        (Interval(-2, -1, "t"), "lower", 0, Verdict.HELPS),
        (Interval(-2, -1, "t"), "higher", 0, Verdict.HURTS),
        (Interval(1, 2, "t"), "lower", 0, Verdict.HURTS),
        (Interval(1, 2, "t"), "higher", 0, Verdict.HELPS),
        (Interval(-1, 2, "t"), "lower", 0, Verdict.INCONCLUSIVE),
        (Interval(0, 2, "t"), "lower", 0, Verdict.INCONCLUSIVE),
        (None, "lower", 0, Verdict.INCONCLUSIVE),
        (Interval(-2, -1, "t"), "lower", 1, Verdict.INCONCLUSIVE),  # survivors only
        (Interval(1, 2, "t"), "lower", 1, Verdict.HURTS),
        (Interval(-2, -1, "t"), "lower", -1, Verdict.HELPS),
        (Interval(1, 2, "t"), "lower", -1, Verdict.INCONCLUSIVE),  # the baseline's survivors only
        (Interval(-2, -1, "t"), "higher", -1, Verdict.INCONCLUSIVE),
        (Interval(1, 2, "t"), "higher", -1, Verdict.HELPS),
        (Interval(-1, -1, "t"), "lower", 0, Verdict.INCONCLUSIVE),  # seeds that repeat nothing
    ],
)
def test_decide(interval, direction, more_lost, verdict):
    assert decide(Evidence(interval, 3, more_lost), Rule(direction, 0.05))[0] is verdict


def test_seeds_that_change_nothing_are_no_repetitions():
    # 0.1 three times has a computed standard deviation above 0, the true one is 0.
    effect = compare_paired({0: 0.9, 1: 0.9, 2: 0.9}, {0: 1.0, 1: 1.0, 2: 1.0}, (0, 1, 2), LOWER)
    assert effect.interval.width == 0
    assert effect.verdict is Verdict.INCONCLUSIVE
    assert effect.note == "all 3 seeds give exactly the same difference, as repetitions would"
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
    effect = compare_paired(arm, baseline, (0, 1, 2), LOWER)
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
    effect = compare_paired({0: 1.0, 1: math.nan, 3: 2.0}, {0: 2.0, 1: 1.0, 2: 1.0, 3: 3.5}, (0, 1, 2, 3), LOWER)
    assert effect.seeds == (0, 3)
    assert effect.left_out == (1, 2)
    assert effect.bootstrap is None
    assert effect.t is not None


def test_no_pair_at_all():
    effect = compare_paired({}, {0: 1.0}, (0,), LOWER)
    assert effect.mean is None
    assert effect.verdict is Verdict.INCONCLUSIVE
    assert effect.note == "no seed has a finite result in both arms; 1 of 1 seeds left out"
    effect = compare_paired({0: math.nan}, {0: 1.0}, (0,), LOWER, arm_lost=Lost(diverged=1))
    assert effect.note == (
        "no seed has a finite result in both arms; 1 of 1 seeds left out; every run of this arm diverged"
    )


def test_survivors_alone_do_not_make_an_arm_help():
    arm, baseline = {0: 1.0, 1: 1.02, 2: math.nan}, {0: 2.0, 1: 2.01, 2: 2.02}
    assert compare_paired(arm, baseline, (0, 1, 2), LOWER).verdict is Verdict.HELPS
    effect = compare_paired(arm, baseline, (0, 1, 2), LOWER, Lost(diverged=1))
    assert effect.verdict is Verdict.INCONCLUSIVE
    assert effect.note == (
        "better in the seeds that finished, but this arm lost 1 more than the baseline; 1 of 3 seeds left out; "
        "1 run of this arm diverged"
    )


@pytest.mark.parametrize(("lost", "what"), [(Lost(diverged=1), "diverged"), (Lost(crashed=1), "crashed")])
def test_survivors_of_the_baseline_do_not_make_an_arm_hurt(lost, what):
    arm, baseline = {0: 2.0, 1: 2.01, 2: 2.02}, {0: 1.0, 1: 1.02}
    assert compare_paired(arm, baseline, (0, 1, 2), LOWER).verdict is Verdict.HURTS
    effect = compare_paired(arm, baseline, (0, 1, 2), LOWER, baseline_lost=lost)
    assert effect.verdict is Verdict.INCONCLUSIVE
    assert "worse in the seeds that finished, but the baseline lost 1 more than this arm" in effect.note
    assert effect.note.endswith(f"1 of 3 seeds left out; 1 run of the baseline {what}")


def test_losses_are_noted_even_if_they_do_not_limit_the_verdict():
    arm, baseline = {0: 1.0, 1: 1.02, 2: math.nan}, {0: 2.0, 1: 2.01}
    effect = compare_paired(arm, baseline, (0, 1, 2), LOWER, Lost(diverged=1), Lost(crashed=1))
    assert effect.verdict is Verdict.HELPS
    assert effect.note == "1 of 3 seeds left out; 1 run of this arm diverged; 1 run of the baseline crashed"
    effect = compare_paired(arm, {}, (0, 1, 2), LOWER, Lost(diverged=1), Lost(diverged=3))
    assert effect.note.endswith("1 run of this arm diverged; every run of the baseline diverged")


def test_p_of_failures_by_chance():
    # Three runs of each fail with chance 1/2: all of one and none of the other, either way, in 2 of 2^6 = 64 cases.
    assert chance_p(3, 0, 3) == chance_p(0, 3, 3) == pytest.approx(2 / 64)
    assert chance_p(5, 0, 5) == pytest.approx(2 / 1024)
    assert chance_p(2, 0, 3) == pytest.approx(2 * (1 + 6) / 64)  # 5 or 6 of 6
    assert chance_p(1, 1, 3) == 1.0
    assert find_jump({0: 1.0, 1: 9.0, 2: 2.0}, {1}) == 7.5
    assert find_jump({0: 1.0, 1: 9.0}, {0, 1}) == find_jump({0: 1.0, 1: 9.0}, {7}) == 0.0


def test_seeds_against_chance() -> None:
    assert seeds_against_chance(3, 0, 3, 0.05) == 3  # 1/32
    assert seeds_against_chance(3, 0, 3, 0.05 / 10) == seeds_against_chance(0, 3, 3, 0.05 / 10) == 5  # 1/512
    assert seeds_against_chance(2, 1, 3, 0.05) == next(n for n in range(3, 99) if _chance(2 / 3, 1 / 3, n) <= 0.05)
    assert seeds_against_chance(1, 1, 3, 0.05) is None  # alike: no number of seeds tells them apart


def _chance(mine: float, theirs: float, n: int) -> float:
    return chance_p(round(mine * n), round(theirs * n), n)


def test_failures_that_may_be_chance_limit_the_p_of_a_family():
    rule, baseline = Rule("lower", 0.05, correction="holm"), {0: 1.0, 1: 1.1, 2: 0.9}
    worst = compare_paired({0: 9.0, 1: 9.0, 2: 9.1}, baseline, (0, 1, 2), rule, arm_failed={0, 1, 2})
    mixed = compare_paired({0: 1.2, 1: 9.0, 2: 1.0}, baseline, (0, 1, 2), rule, arm_failed={1})
    assert (worst.failures, mixed.failures) == ((3, 0), (1, 0))
    same = compare_paired({0: 1.1, 1: 1.3, 2: 0.8}, baseline, (0, 1, 2), rule)
    assert judge_family({"worst": worst, "same": same}, rule)["worst"].verdict is Verdict.HURTS
    limited = judge_family({"worst": worst, "mixed": mixed}, rule)["worst"]
    assert (limited.p_value, limited.p_adjusted) == (pytest.approx(2 / 64), pytest.approx(4 / 64))
    assert limited.verdict is Verdict.INCONCLUSIVE
    assert limited.note.endswith("p of 3 against 0 failures by chance: 0.0312")
    assert (worst.seeds_needed, limited.seeds_needed) == (2, 4)  # 4 of 4 against none: 2 x 2/256
    # Failed by a hair: 1.6 beside 1.5 and 1.4 is a jump of 0.15, which does not make a difference of 8.
    close = compare_paired({0: 1.5, 1: 1.6, 2: 1.4}, baseline, (0, 1, 2), rule, arm_failed={1})
    assert close.jump == pytest.approx(0.15)
    assert judge_family({"worst": worst, "close": close}, rule)["worst"].verdict is Verdict.HURTS


def test_wider_interval_covers_at_three_seeds():
    """The rule "the wider decides" keeps a null effect's false alarms near alpha; the bootstrap alone does not."""
    rng = np.random.default_rng(1)
    studies = [tuple(rng.normal(size=3)) for _ in range(400)]

    def covers(interval: Interval) -> bool:
        return interval.low <= 0 <= interval.high

    bootstrap = np.mean([covers(bootstrap_interval(d, 0.05)) for d in studies[:60]])
    decided = np.mean(
        [
            covers(compare_paired(dict(enumerate(d)), {0: 0.0, 1: 0.0, 2: 0.0}, (0, 1, 2), LOWER).interval)
            for d in studies[:60]
        ]
    )
    t = np.mean([covers(t_interval(d, 0.05)) for d in studies])
    assert bootstrap < 0.85
    assert decided >= 0.9
    assert 0.92 <= t <= 0.98


def test_an_arm_that_changes_nothing_differs_from_repetitions():
    same = {0: 1.0, 1: 2.0, 2: 3.0}
    effect = compare_paired(same, same, (0, 1, 2), LOWER)
    assert effect.verdict is Verdict.INCONCLUSIVE
    assert effect.note == "the difference is exactly 0 in all 3 seeds, as if it changed nothing"


def test_the_order_of_seeds_does_not_matter():
    differences = (0.42, -0.31, 0.94, 0.33, -0.24)
    intervals = {
        bootstrap_interval(some, 0.05) for some in (differences, differences[::-1], differences[2:] + differences[:2])
    }
    assert len(intervals) == 1


def test_losses_count_where_both_sides_had_a_run():
    # The baseline ran ten seeds and lost two that the arm never ran; of the arm's three one diverged.
    arm, baseline = {0: 1.0, 1: 1.02}, {s: 2.0 + s / 100 for s in range(8)}
    lost = Lost(diverged=1), Lost(diverged=2, unpaired=2)
    effect = compare_paired(arm, baseline, tuple(range(10)), LOWER, *lost)
    assert effect.more_lost == 1
    assert effect.verdict is Verdict.INCONCLUSIVE
    assert effect.note.startswith("better in the seeds that finished, but this arm lost 1 more than the baseline")
    assert effect.note.endswith("1 run of this arm diverged; 2 runs of the baseline diverged")


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.04, times 3, 2, 1: 0.03, 0.04, 0.04.
    assert holm({"a": 0.04, "b": 0.01, "c": 0.02}) == pytest.approx({"a": 0.04, "b": 0.03, "c": 0.04})
    # 0.03 x 2 = 0.06; 0.04 x 1 may not be less than what came before.
    assert holm({"a": 0.03, "b": 0.04, "c": None}) == {"a": pytest.approx(0.06), "b": pytest.approx(0.06), "c": None}
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_the_family_takes_a_verdict_back():
    # Differences -1, -2, -3, -4: mean -2.5, s = 1.29, t = 3.873 with 3 degrees of freedom, p = 0.0305. Alone it helps,
    # as one of two the Holm p is 0.061.
    arm, other = {s: -1.0 - s for s in range(4)}, {0: 1.0, 1: -1.0, 2: 1.0, 3: -1.0}
    zero = dict.fromkeys(range(4), 0.0)
    rule = Rule("lower", 0.05, "t", "holm")
    effects = {name: compare_paired(one, zero, (0, 1, 2, 3), rule) for name, one in (("arm", arm), ("other", other))}
    assert effects["arm"].verdict is Verdict.HELPS
    judged = judge_family(effects, rule)
    assert judged["arm"].p_value == pytest.approx(0.0305, abs=1e-4)
    assert judged["arm"].p_adjusted == pytest.approx(0.0609, abs=1e-4)
    assert judged["arm"].verdict is Verdict.INCONCLUSIVE
    assert judged["arm"].note == "its interval excludes 0, but p = 0.0609 over the study's comparisons"
    assert judge_family(effects, LOWER) == effects
    # An arm whose seeds are still to come, or all lost, counts as it will: no verdict stands until it is there alone.
    for seeds in ((), (0,)):
        early = effects | {"other": compare_paired({s: other[s] for s in seeds}, zero, (0, 1, 2, 3), rule)}
        judged = judge_family(early, rule)
        assert judged["arm"].p_adjusted == pytest.approx(0.0609, abs=1e-4)
        assert judged["other"] == early["other"]


def test_no_difference_needs_the_whole_interval_within_the_margin():
    # Mean 0, s = 0.1, n = 4: half width 3.18245 * 0.1155 / 2 = 0.184 (s = sqrt(0.04 / 3)).
    arm, zero = {0: 0.1, 1: -0.1, 2: 0.1, 3: -0.1}, dict.fromkeys(range(4), 0.0)
    effect = compare_paired(arm, zero, (0, 1, 2, 3), Rule("lower", 0.05, within=0.19))
    assert (effect.verdict, effect.text) == (Verdict.NO_DIFFERENCE, "no difference within 0.19")
    # t of each side: 0.19 / 0.0577 = 3.29 with 3 degrees of freedom, one-sided p = 0.0230.
    assert effect.p_outside == pytest.approx(0.0230, abs=2e-4)
    assert compare_paired(arm, zero, (0, 1, 2, 3), Rule("lower", 0.05, within=0.18)).verdict is Verdict.INCONCLUSIVE
    # As one of three such arms the p of each is 0.069.
    rule = Rule("lower", 0.05, "t", "holm", within=0.19)
    judged = judge_family({name: compare_paired(arm, zero, (0, 1, 2, 3), rule) for name in "abc"}, rule)
    assert {one.verdict for one in judged.values()} == {Verdict.INCONCLUSIVE}
    # Runs that were lost speak against it.
    lost = compare_paired(arm, zero, (0, 1, 2, 3, 4), Rule("lower", 0.05, within=0.19), Lost(diverged=1))
    assert lost.verdict is Verdict.INCONCLUSIVE


def test_a_difference_too_small_to_matter_is_no_difference():
    arm, zero = {0: -0.010, 1: -0.011, 2: -0.012}, dict.fromkeys(range(3), 0.0)
    effect = compare_paired(arm, zero, (0, 1, 2), Rule("lower", 0.05, within=0.1))
    assert (effect.verdict, effect.note) == (Verdict.NO_DIFFERENCE, "not 0, but too small to matter")
    assert p_outside("t", (0.5, 0.5), 0.1) is None


@pytest.mark.parametrize(("test", "centre"), [("t", 0.7), ("wilcoxon", -0.5), ("sign", -0.5)])
def test_the_effect_is_the_centre_of_its_interval(test, centre):
    # Nine seeds, one with a spike: the mean is (-0.2 - 0.3 - ... - 0.9 + 10.7) / 9 = 6.3 / 9, the fifth is -0.5. Of the
    # 45 means of pairs the 9 with the spike lie above all others, and the 23rd of the rest from below is -0.5: of -0.9,
    # -0.85, ... -0.55 there are 1 + 1 + 2 + 2 + 3 + 3 + 4 + 4 = 20, of -0.5 four.
    differences = (-0.2, -0.3, -0.4, -0.5, -0.6, -0.7, -0.8, -0.9, 10.7)
    zero = dict.fromkeys(range(9), 0.0)
    effect = compare_paired(dict(enumerate(differences)), zero, tuple(range(9)), Rule("lower", 0.05, test))
    assert effect.mean == pytest.approx(0.7)
    assert effect.centre == pytest.approx(centre)
    assert effect.interval.low <= effect.centre <= effect.interval.high
    assert effect.verdict is (Verdict.HELPS if test == "sign" else Verdict.INCONCLUSIVE)  # eight of nine


def test_the_interval_is_that_of_the_test():
    differences = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    assert [interval_of(test, differences, 0.05).method for test in ("t", "wilcoxon", "sign")] == [
        "t",
        "wilcoxon",
        "sign",
    ]
