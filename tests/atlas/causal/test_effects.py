"""Effects of interventions on groups of samples, by hand and against SciPy."""

import numpy as np
import pytest
from scipy import stats

from lightning_moevlm.atlas.causal.effects import LEAST, group_effects, paired_effect
from lightning_moevlm.atlas.causal.scores import SampleScores, ScoredSamples


def scored(before: np.ndarray, **after: np.ndarray) -> ScoredSamples:
    keys = tuple(map(str, range(len(before))))
    changed = {name: scores(loss_N) for name, loss_N in after.items()}
    return ScoredSamples(keys, ("",) * len(before), scores(before), changed)


def scores(loss_N: np.ndarray) -> SampleScores:
    return SampleScores(loss_N, {"text": loss_N / 2}, {"text": (loss_N < 0.5) * 1.0})


def test_an_effect_is_that_of_the_paired_t_test() -> None:
    random = np.random.default_rng(0)
    before, after = random.normal(size=(2, 30))
    effect = paired_effect(before, after)
    assert effect is not None and effect.interval is not None
    expected = stats.ttest_rel(after, before)
    assert effect.mean == pytest.approx(np.mean(after - before))
    assert effect.p == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval(0.95)
    assert (effect.interval.low, effect.interval.high) == pytest.approx((low, high))
    assert effect.num_samples == 30


def test_samples_without_a_score_do_not_count() -> None:
    before, after = np.array([1.0, np.nan, 2.0, 3.0]), np.array([2.0, 1.0, np.nan, 3.0])
    effect = paired_effect(before, after)
    assert effect is not None and effect.num_samples == 2 and effect.mean == pytest.approx(0.5)
    assert paired_effect(np.array([np.nan]), np.array([1.0])) is None


def test_no_difference_has_p_1() -> None:
    same = np.arange(10.0)
    effect = paired_effect(same, same)
    assert effect is not None and effect.p == 1
    assert effect.interval is not None and effect.interval.low <= 0 <= effect.interval.high


def test_a_group_is_compared_with_the_others_and_corrected_over_all() -> None:
    random = np.random.default_rng(1)
    before = random.uniform(0, 0.4, 60)
    member_N = np.arange(60) < 20
    hurt = before + np.where(member_N, 0.3 + 0.05 * random.normal(size=60), 0.02 * random.normal(size=60))
    found = group_effects(
        scored(before, hurt=hurt, same=before), {"apples": member_N, "few": np.arange(60) < LEAST - 1}
    )
    assert [(each.change, each.group) for each in found] == [("hurt", "apples"), ("same", "apples")]
    effect, none = found
    assert effect.more is not None and effect.elsewhere is not None
    difference = hurt - before
    welch = stats.ttest_ind(difference[member_N], difference[~member_N], equal_var=False)
    assert effect.more.p == pytest.approx(welch.pvalue)
    low, high = welch.confidence_interval(0.95)
    assert effect.more.interval is not None
    assert (effect.more.interval.low, effect.more.interval.high) == pytest.approx((low, high))
    assert effect.elsewhere.mean == pytest.approx(difference[~member_N].mean())
    # Holm over two: the smaller p is doubled
    assert effect.loss.p_adjusted == pytest.approx(2 * effect.loss.p) and none.loss.p_adjusted == 1
    assert effect.right["text"].mean == pytest.approx((hurt[member_N] < 0.5).mean() - 1)
    everyone = group_effects(scored(before, hurt=hurt), {"all": np.ones(60, dtype=bool)})
    assert everyone[0].elsewhere is None and everyone[0].more is None
