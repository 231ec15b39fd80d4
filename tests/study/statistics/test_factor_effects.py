"""Main effects and interactions against cells written by hand."""

import itertools
import math

import pytest

from lightning_moevlm.study.statistics.effects import Lost
from lightning_moevlm.study.statistics.factor_effects import Contrast, Crossing
from lightning_moevlm.study.statistics.factor_effects import factor_effects as effects_of_crossing
from lightning_moevlm.study.statistics.verdict import Rule, Verdict

RULE = Rule("lower", 0.05)
CELLS = {f"a{a}b{b}": {"a": bool(a), "b": bool(b)} for a, b in itertools.product((0, 1), repeat=2)}


def factor_effects(values, levels, *rest):
    """Of switches, each arm's as true and false."""
    factors = dict.fromkeys(factor for on in levels.values() for factor in on)
    named = {arm: {factor: "on" if on else "off" for factor, on in own.items()} for arm, own in levels.items()}
    crossing = Crossing(tuple(Contrast(factor, "on", "off") for factor in factors), named)
    return effects_of_crossing(values, crossing, *rest)


def values(seeds: int, cell) -> dict[str, dict[int, float]]:
    return {arm: {s: cell(s, **on) for s in range(seeds)} for arm, on in CELLS.items()}


def test_effects_of_two_switches_by_hand():
    # Seed 0: 10, 8 (b), 7 (a), 2 (both). a: (7 + 2)/2 - (10 + 8)/2 = -4.5; b: (8 + 2)/2 - (10 + 7)/2 = -3.5;
    # a x b: (2 - 8) - (7 - 10) = -3. Seed 1 is seed 0 plus a level of 100 and an interaction of 1 less.
    cells = {(False, False): 10.0, (False, True): 8.0, (True, False): 7.0, (True, True): 2.0}
    found = factor_effects(
        values(2, lambda s, a, b: cells[a, b] + 100 * s + (s if a and b else 0)), CELLS, (0, 1), RULE
    )
    assert [one.name for one in found] == ["a", "b", "a x b"]
    # With 3 for the last cell of seed 1: a: -4, b: -3, a x b: -2.
    assert [one.effect.differences for one in found] == [
        pytest.approx((-4.5, -4.0)),
        pytest.approx((-3.5, -3.0)),
        pytest.approx((-3.0, -2.0)),
    ]


def test_switches_that_add_up_have_no_interaction():
    noise = {0: 0.01, 1: -0.02, 2: 0.015}
    found = factor_effects(
        values(3, lambda s, a, b: 5 + s - 2 * a - b + noise[s] * (a + 2 * b + 3 * a * b)), CELLS, (0, 1, 2), RULE
    )
    words = {one.name: one.effect.verdict for one in found}
    assert words == {"a": Verdict.HELPS, "b": Verdict.HELPS, "a x b": Verdict.INCONCLUSIVE}


def test_three_switches_have_three_interactions_and_one_family():
    levels = {
        "".join(map(str, on)): dict(zip("abc", map(bool, on), strict=True))
        for on in itertools.product((0, 1), repeat=3)
    }
    cells = {
        arm: {s: 1.0 * on["a"] + 4.0 * on["b"] * on["c"] + 0.1 * s * on["a"] for s in range(3)}
        for arm, on in levels.items()
    }
    found = {one.name: one.effect for one in factor_effects(cells, levels, (0, 1, 2), Rule("lower", 0.05, "t", "holm"))}
    assert list(found) == ["a", "b", "c", "a x b", "a x c", "b x c"]
    # b x c: b with c on adds 4, with c off nothing; b itself 2 on average.
    assert found["b x c"].differences == pytest.approx((4.0, 4.0, 4.0))
    assert found["b"].differences == pytest.approx((2.0, 2.0, 2.0))
    assert found["a"].differences == pytest.approx((1.0, 1.1, 1.2))
    assert found["a x b"].differences == pytest.approx((0.0, 0.0, 0.0))
    # Only a varies over seeds and has a p; alone in its family it is not changed.
    assert found["a"].p_adjusted == found["a"].p_value


def test_a_fraction_gives_main_effects_and_leaves_out_what_never_varies():
    # The half with c = a xor b, no: with c on exactly where a and b agree: a b c has one sign, a x b is aliased with c.
    levels = {f"{a:d}{b:d}": {"a": bool(a), "b": bool(b), "c": a == b} for a, b in itertools.product((0, 1), repeat=2)}
    cells = {arm: {0: 3.0 * on["a"], 1: 3.0 * on["a"] + 0.1} for arm, on in levels.items()}
    found = {one.name: one.effect for one in factor_effects(cells, levels, (0, 1), RULE)}
    assert found["a"].differences == pytest.approx((3.0, 3.0))
    # b x c agrees exactly where a is on: twice the contrast of a, which is how an alias shows.
    assert found["b x c"].differences == pytest.approx((6.0, 6.0))


def test_a_seed_with_a_hole_is_left_out_of_all():
    cells = values(3, lambda s, a, b: float(s + a))
    cells["a1b1"][1] = math.nan
    del cells["a0b0"][2]
    for one in factor_effects(cells, CELLS, (0, 1, 2), RULE):
        assert one.effect.seeds == (0,)
        assert one.effect.left_out == (1, 2)


def test_survivors_alone_make_no_factor_help():
    # With a on the loss is lower by 1, but three of its runs have diverged: seeds 2 and 3 have no contrast.
    cells = values(4, lambda s, a, b: 5 + s - a * (1 + s / 100) - b * (0.5 + s / 100))
    cells["a1b0"] |= {2: math.nan, 3: math.nan}
    cells["a1b1"][3] = math.nan
    lost = {"a1b0": Lost(diverged=2), "a1b1": Lost(diverged=1), "a0b1": Lost()}
    judged = {one.name: one.effect for one in factor_effects(cells, CELLS, (0, 1, 2, 3), RULE, lost)}
    assert factor_effects(cells, CELLS, (0, 1, 2, 3), RULE)[0].effect.verdict is Verdict.HELPS
    assert judged["a"].verdict is Verdict.INCONCLUSIVE
    assert judged["a"].note == (
        "better in the seeds that finished, but runs with it on lost 3 more than runs with it off; "
        "2 of 4 seeds left out; 3 of the runs with it on diverged"
    )
    # b lost fewer with it on (1) than with it off (2), and it is ahead: nothing speaks against it.
    assert judged["b"].verdict is Verdict.HELPS
    higher = factor_effects(cells, CELLS, (0, 1, 2, 3), Rule("higher", 0.05), lost)
    assert higher[1].effect.limit == (
        "worse in the seeds that finished, but runs with it off lost 1 more than runs with it on"
    )


@pytest.mark.parametrize("test", ["t", "wilcoxon", "sign"])
def test_a_switch_that_changes_nothing_has_no_effect_of_rounding(test):
    levels = {
        "".join(map(str, on)): dict(zip("abc", map(bool, on), strict=True))
        for on in itertools.product((0, 1), repeat=3)
    }
    cells = {
        arm: {s: 0.1 * (s + 1) + 0.7 * on["a"] * (1 + s / 7) + 0.2 * on["b"] * (1 + s / 3) for s in range(6)}
        for arm, on in levels.items()
    }
    found = {one.name: one.effect for one in factor_effects(cells, levels, tuple(range(6)), Rule("lower", 0.05, test))}
    for name in ("c", "a x b", "a x c", "b x c"):
        assert found[name].differences == (0.0,) * 6
        assert found[name].verdict is Verdict.INCONCLUSIVE


def test_levels_must_be_whole():
    with pytest.raises(ValueError, match="arm 'y' has no level of b"):
        factor_effects({}, {"x": {"a": True, "b": False}, "y": {"a": False}}, (0,), RULE)
    with pytest.raises(ValueError, match="factor 'a' is the same in every arm"):
        factor_effects({}, {"x": {"a": True}, "y": {"a": True}}, (0,), RULE)
