"""Simulated studies whose runs may fail: which errors are kept at any rate of failure, and which interval is not.

A run that survives ends at its arm's loss, with noise of deviation 1. One that fails counts with its capped value: far
above (`FAR`, the untrained model, as after a divergence), or where a sick model ends (`NEAR`, spread out, as a model
that did not learn). Rates of false alarms have the standard error of `test_coverage.error`.
"""

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
from scipy import stats

from lightning_moevlm.study.statistics.cures.cure_effect import CureVerdict, judge_cell, judge_cures
from lightning_moevlm.study.statistics.cures.damage import judge_damage, judge_damages
from lightning_moevlm.study.statistics.effects import compare_paired, judge_family
from lightning_moevlm.study.statistics.intervals import t_interval
from lightning_moevlm.study.statistics.outcomes.survival import Final, Survival
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


@pytest.mark.slow  # whole verdicts with bootstrap intervals, 30 ms each
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("n", [3, 5])
def test_verdicts_of_a_family_keep_their_error_with_failed_runs(n: int) -> None:
    """Five arms that do nothing, beside a baseline; all of them fail alike."""
    rng, rule, seeds, studies = np.random.default_rng(11), Rule("lower", 0.05, "t", "holm"), tuple(range(n)), 150
    for rate in (0.1, 0.5):
        alarms = 0
        for _ in range(studies):
            values, failed = draw(rng, (6, n), rate)
            sick = [set(np.flatnonzero(one).tolist()) for one in failed]
            effects = {
                str(i): compare_paired(
                    dict(enumerate(values[i].tolist())),
                    dict(enumerate(values[0].tolist())),
                    seeds,
                    rule,
                    arm_failed=sick[i],
                    baseline_failed=sick[0],
                )
                for i in range(1, 6)
            }
            words = [one.verdict for one in judge_family(effects, rule).values()]
            alarms += any(word in (Verdict.HELPS, Verdict.HURTS) for word in words)
        print(f"n={n} rate={rate}: {alarms / studies:.4f}")
        assert alarms / studies <= 0.05 + 2 * error(studies)


# Per illness: five cures that do nothing, three that undo half, three that undo all, one that doubles the damage.
SHARES = (0.0,) * 5 + (0.5,) * 3 + (1.0,) * 3 + (-1.0,)


def draw_matrix(rng: np.random.Generator, illnesses: int, n: int, rate: float, damage: float) -> list[dict]:
    """Return rows of a matrix: finals of the healthy, the sick and each cured model.

    A sick run fails with a chance, and then counts with three times the damage; else it has the damage. A cure undoes
    its share of either.
    """

    def finals(share: float) -> dict[int, Final]:
        failed = rng.random(n) < rate
        left = (1 - share) * np.where(failed, 3 * damage, damage) + rng.normal(size=n)
        return {seed: Final(float(left[seed]), bool(failed[seed])) for seed in range(n)}

    rows = []
    for _ in range(illnesses):
        healthy = {seed: Final(float(noise)) for seed, noise in enumerate(rng.normal(size=n))}
        rows.append({"healthy": healthy, "sick": finals(0.0), "cured": [finals(share) for share in SHARES]})
    return rows


def judge_matrix(rows: list[dict], n: int) -> tuple[dict, dict]:
    """Return the verdicts of all cells, corrected over each row, and over the matrix."""
    rule, seeds = Rule("lower", 0.05, "t", "holm"), tuple(range(n))
    damages = judge_damages(
        {i: judge_damage(row["healthy"], row["sick"], seeds, rule) for i, row in enumerate(rows)}, rule
    )
    cells = {
        (i, j): judge_cell(row["healthy"], row["sick"], cured, seeds, rule)
        for i, row in enumerate(rows)
        for j, cured in enumerate(row["cured"])
    }
    unproved = {key for key in cells if not damages[key[0]].proved}
    by_row: dict[tuple[int, int], CureVerdict] = {}
    for i in range(len(rows)):
        own = {key: cell for key, cell in cells.items() if key[0] == i}
        by_row |= {key: cell.verdict for key, cell in judge_cures(own, rule, unproved & own.keys()).items()}
    largest = [max(cell.jump for key, cell in cells.items() if key[0] == i) for i in range(len(rows))]
    jumps = {key: largest[key[0]] for key in cells}
    return by_row, {key: cell.verdict for key, cell in judge_cures(cells, rule, unproved, jumps).items()}


def count_errors(verdicts: dict[tuple[int, int], CureVerdict]) -> dict[str, bool]:
    """Return whether any cell is wrong, by kind of claim: on a cure that does nothing, and on one that undoes half."""
    idle = [word for (_, j), word in verdicts.items() if SHARES[j] == 0.0]
    half = [word for (_, j), word in verdicts.items() if SHARES[j] == 0.5]
    return {
        "nothing is undone, and yet": any(w in (CureVerdict.HELPS, CureVerdict.HARMS, CureVerdict.CURES) for w in idle),
        "half is undone, and yet it cures": CureVerdict.CURES in half,
        "half is undone, and yet it is none": CureVerdict.NONE in half,
    }


@pytest.mark.slow  # 120 cells of ten tests each, a hundred times over
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("n", "rate"), [(3, 0.0), (3, 0.5), (3, 1.0), (5, 0.0), (5, 0.5), (5, 1.0), (10, 0.5)])
def test_a_whole_matrix_keeps_its_error(n: int, rate: float) -> None:
    """Ten illnesses and twelve cures, a damage of 40 deviations: false claims of each kind, and the cells decided.

    Holm over each illness keeps the error of each row; Holm over the matrix keeps that of the whole. Ten rows at 5 %
    have at least one false claim in up to 40 % of matrices.
    """
    rng, matrices = np.random.default_rng(13), 100
    wrong: Counter[tuple[str, str]] = Counter()
    decided: Counter[tuple[str, float]] = Counter()
    for _ in range(matrices):
        by_row, by_matrix = judge_matrix(draw_matrix(rng, 10, n, rate, 40.0), n)
        for i in range(10):
            kinds = count_errors({key: word for key, word in by_row.items() if key[0] == i})
            wrong.update({("row", kind): found for kind, found in kinds.items()})
        wrong.update({("matrix", kind): found for kind, found in count_errors(by_matrix).items()})
        wrong.update({("all rows", kind): found for kind, found in count_errors(by_row).items()})
        for family, verdicts in (("row", by_row), ("matrix", by_matrix)):
            decided.update((family, SHARES[j]) for (_, j), word in verdicts.items() if word is not CureVerdict.UNCLEAR)
    for family, of in (("row", 10 * matrices), ("matrix", matrices)):
        told = {share: decided[family, share] / (10 * matrices * SHARES.count(share)) for share in sorted({*SHARES})}
        rates = {kind: found / of for (own, kind), found in wrong.items() if own == family}
        print(f"n={n} rate={rate}, Holm over the {family}: wrong {rates}, decided {told}")
        assert max(rates.values()) <= 0.05 + 2 * error(of)
    any_row = {kind: found / matrices for (own, kind), found in wrong.items() if own == "all rows"}
    print(f"n={n} rate={rate}, a false claim in any row: {any_row}")
    assert max(any_row.values()) <= 1 - 0.95**10 + 2 * math.sqrt(0.24 / matrices)
