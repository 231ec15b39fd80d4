"""Metrics that may not get worse, against numbers worked out by hand."""

import math

import pytest

from lightning_moevlm.study.statistics.effects import check_guard, compare_paired
from lightning_moevlm.study.statistics.verdict import GuardResult, Rule, Verdict, apply_guards

LOWER = Rule("lower", 0.05)


def test_guards():
    arm, baseline = {0: 0.30, 1: 0.34, 2: 0.38}, {0: 0.10, 1: 0.14, 2: 0.12}
    # Lower is better: worse by 0.20, 0.20, 0.26, mean 0.22, s = 0.0346, half width 4.30265 * 0.02 = 0.086.
    guard = check_guard("drop_rate", arm, baseline, (0, 1, 2), "lower", 0.1, 0.05)
    assert guard.worse == pytest.approx(0.22)
    assert guard.is_broken
    assert guard.text == "drop_rate is worse by 0.22, and 0.1 is allowed"
    doubtful = check_guard("drop_rate", arm, baseline, (0, 1, 2), "lower", 0.15, 0.05)
    assert doubtful.text.endswith("0.15 is allowed, but its interval includes less")
    assert not check_guard("drop_rate", arm, baseline, (0, 1, 2), "lower", 0.25, 0.05).is_broken
    assert check_guard("accuracy", arm, baseline, (0, 1, 2), "higher", 0.0, 0.05).worse == pytest.approx(-0.22)


def test_a_guard_is_not_broken_by_rounding():
    # 1.05 - 1 is 0.050000000000000044 in fp64.
    assert not check_guard("x", {0: 1.05}, {0: 1.0}, (0,), "lower", 0.05, 0.05).is_broken
    assert check_guard("x", {0: 1.0501}, {0: 1.0}, (0,), "lower", 0.05, 0.05).is_broken
    assert not check_guard("x", {0: 0.3 - 0.1}, {0: 0.2}, (0,), "higher", 0.0, 0.05).is_broken


def test_a_guard_that_is_not_finite_in_a_seed_does_not_hold():
    arm, baseline = {0: 0.1, 1: math.inf, 2: 0.1}, dict.fromkeys(range(3), 0.1)
    guard = check_guard("drop_rate", arm, baseline, (0, 1, 2), "lower", 0.05, 0.05, compared=(0, 1, 2))
    assert (guard.worse, guard.is_broken, guard.missing) == (0.0, False, 1)
    assert guard.text == "guard drop_rate could not be compared in 1 of the seeds: not finite in both arms"
    assert apply_guards(Verdict.HELPS, (guard,)) is Verdict.INCONCLUSIVE
    # A seed that the primary metric lacks, too, is told of already.
    assert check_guard("drop_rate", arm, baseline, (0, 1, 2), "lower", 0.05, 0.05, compared=(0, 2)).missing == 0


def test_an_arm_that_breaks_a_guard_does_not_help():
    arm, zero = {0: -1.0, 1: -1.1, 2: -1.2}, dict.fromkeys(range(3), 0.0)
    broken, held = GuardResult("drop_rate", 0.1, 0.22, None), GuardResult("max_violation", 0.1, -1.0, None)
    effect = compare_paired(arm, zero, (0, 1, 2), LOWER, guards=(held, broken))
    assert effect.verdict is Verdict.BREAKS_GUARD
    assert effect.note.startswith("drop_rate is worse by 0.22, and 0.1 is allowed")
    assert compare_paired(arm, zero, (0, 1, 2), LOWER, guards=(held,)).verdict is Verdict.HELPS
    unknown = compare_paired(arm, zero, (0, 1, 2), LOWER, guards=(GuardResult("drop_rate", 0.1, None, None),))
    assert unknown.verdict is Verdict.INCONCLUSIVE
    assert unknown.note == "guard drop_rate could not be compared: no seed has it in both arms"
    assert apply_guards(Verdict.HURTS, (broken,)) is Verdict.HURTS  # what hurts already is not softened
