"""Simulated studies whose runs may fail: which errors are kept at any rate of failure, and which interval is not.

A run that survives ends at its arm's loss, with noise of deviation 1. One that fails counts with its capped value: far
above (`FAR`, the untrained model, as after a divergence), or where a sick model ends (`NEAR`, spread out, as a model
that did not learn). Rates of false alarms have the standard error of `test_coverage.error`.
"""

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from lightning_moevlm.study.statistics.effects import compare_paired, judge_family
from lightning_moevlm.study.statistics.intervals import t_interval
from lightning_moevlm.study.statistics.outcomes.survival import Survival
from lightning_moevlm.study.statistics.paired_tests import mcnemar_p
from lightning_moevlm.study.statistics.verdict import Rule, Verdict
from tests.study.statistics.test_coverage import error

RATES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
FAR, NEAR = 60.0, 15.0  # deviations of the noise
SIZES = (3, 5, 10)
Drawn = tuple[np.ndarray, np.ndarray]  # capped values and whether each failed


def draw(rng: np.random.Generator, shape: tuple[int, ...], rate: float, centre: float = 0.0, far: bool = True) -> Drawn:
    """Return runs of one arm, which fail independently of each other."""
    failed = rng.random(shape) < rate
    bad = np.full(shape, FAR) if far else NEAR + 5.0 * rng.normal(size=shape)
    return np.where(failed, bad, centre + rng.normal(size=shape)), failed


def p_values(differences: np.ndarray) -> np.ndarray:
    """Return the two-sided p of the paired t-test over the last axis; 1 where nothing varies."""
    n = differences.shape[-1]
    deviation = differences.std(-1, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = 2 * stats.t.sf(np.abs(differences.mean(-1)) / (deviation / math.sqrt(n)), n - 1)
    return np.where(deviation == 0, 1.0, found)


@pytest.mark.parametrize("n", SIZES)
def test_interval_of_survivors_covers_whatever_their_share(n: int) -> None:
    """By adding up every outcome, not by chance. Wilson's would cover 0.83 at the worst share."""
    shares = np.linspace(0.0, 1.0, 401)
    covered = np.zeros_like(shares)
    for stable in range(n + 1):
        interval = Survival(stable, n).interval(0.05)
        assert interval is not None
        low, high = interval
        covered += stats.binom.pmf(stable, n, shares) * ((low <= shares + 1e-12) & (shares <= high + 1e-12))
    assert covered.min() >= 0.95


@pytest.mark.parametrize("n", SIZES)
def test_paired_test_of_survivors_keeps_its_error(n: int) -> None:
    """Pairs differ with chance 2 q, either way alike: every outcome added up."""
    for q in np.linspace(0.0, 0.5, 11):
        alarm = sum(
            stats.multinomial.pmf([better, worse, n - better - worse], n, [q, q, 1 - 2 * q])
            for better, worse in product(range(n + 1), repeat=2)
            if better + worse <= n and mcnemar_p(better, worse) <= 0.05
        )
        assert alarm <= 0.05


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("far", [True, False])
def test_capped_differences_keep_the_error_at_any_rate_of_failure(n: int, far: bool) -> None:
    """Both arms are alike. Without failures the rate is 0.05. With them the few values are coarse: mostly the rate is
    smaller, down to 0; the largest one, 0.0544, is that of ten seeds which fail far away at a rate of 1/2.
    """
    rng, studies = np.random.default_rng(7), 20_000
    for rate in RATES:
        arm, baseline = (draw(rng, (studies, n), rate, far=far)[0] for _ in range(2))
        alarms = float((p_values(arm - baseline) <= 0.05).mean())
        print(f"n={n} far={far} rate={rate}: {alarms:.4f}")
        assert alarms <= 0.0544 + 2 * error(studies)


@pytest.mark.parametrize("n", [5, 10])
def test_survivors_interval_covers_at_any_rate_of_failure(n: int) -> None:
    """Of the mean over seeds in which both runs survived, where there are two of these."""
    rng, effect = np.random.default_rng(8), 0.7
    for rate in (0.1, 0.3, 0.5):
        arm, my_failed = draw(rng, (1_500, n), rate, centre=effect)
        baseline, their_failed = draw(rng, (1_500, n), rate / 2)
        found = []
        for differences, lost in zip(arm - baseline, my_failed | their_failed, strict=True):
            interval = t_interval(tuple(differences[~lost]), 0.05)
            found += [] if interval is None else [interval.low <= effect <= interval.high]
        print(f"n={n} rate={rate}: {np.mean(found):.4f} of {len(found)}")
        assert np.mean(found) >= 0.95 - 3 * error(len(found))


@pytest.mark.parametrize("n", SIZES)
def test_capped_interval_covers_if_runs_never_or_always_fail(n: int) -> None:
    """In between it does not: at a rate of 0.1 most samples of three runs hold no failure and show a small effect."""
    rng, studies = np.random.default_rng(9), 20_000
    covered = {}
    for rate in RATES:
        arm = draw(rng, (studies, n), rate)[0]
        true = rate * FAR
        differences = arm - draw(rng, (studies, n), 0.0)[0]
        covered[rate] = float((p_values(differences - true) > 0.05).mean())
    print(f"n={n}: " + ", ".join(f"{rate}: {share:.3f}" for rate, share in covered.items()))
    assert min(covered[0.0], covered[1.0]) >= 0.95 - 2 * error(studies)
    assert covered[0.1] < 0.8


@pytest.mark.slow  # whole verdicts with bootstrap intervals, 3 ms each
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("n", SIZES)
def test_verdicts_of_a_family_keep_their_error_with_failed_runs(n: int) -> None:
    """Five arms that do nothing, beside a baseline; all of them fail alike."""
    rng, studies = np.random.default_rng(11), 200
    for rate in (0.1, 0.5):
        alarms = sum(tells_a_difference(*draw(rng, (6, n), rate)) for _ in range(studies))
        print(f"n={n} rate={rate}: {alarms / studies:.4f}")
        assert alarms / studies <= 0.05 + 2 * error(studies)


def test_failures_by_chance_make_no_verdict() -> None:
    """Three runs of one arm fail and none of the baseline: by chance in 1 of 32. Another arm shows that they can."""
    values = np.array([[0.0, 0.1, 0.2], [FAR, FAR, FAR], [FAR, 0.3, 0.1]])
    failed = values == FAR
    assert tells_a_difference(values[:2], failed[:2])  # of an arm that always fails, nothing says "chance"
    assert not tells_a_difference(values, failed)


def tells_a_difference(values: np.ndarray, failed: np.ndarray) -> bool:
    """Return whether any arm helps or hurts by Holm. values, failed: (arms, seeds), the baseline first."""
    rule, seeds = Rule("lower", 0.05, "t", "holm"), tuple(range(values.shape[1]))
    baseline, *arms = [dict(enumerate(one.tolist())) for one in values]
    sick, *ill = [set(np.flatnonzero(one).tolist()) for one in failed]
    effects = {
        str(i): compare_paired(arm, baseline, seeds, rule, arm_failed=own, baseline_failed=sick)
        for i, (arm, own) in enumerate(zip(arms, ill, strict=True))
    }
    words = [one.verdict for one in judge_family(effects, rule).values()]
    return any(word in (Verdict.HELPS, Verdict.HURTS) for word in words)
