"""A planted specialist is found; of routers with a rule, nothing is claimed beyond it."""

from functools import partial
from pathlib import Path

import pytest

from lightning_moevlm.atlas.make_atlas import ALPHA
from lightning_moevlm.model.routers import FixedRouter, HashRouter
from tests.atlas.observed import PlantedRouter, claims, observe, open_data, small_model, tokens_of

BY_POSITION = {"image/position", "text/position"}
BY_IDENTITY = {"text/word", "text/object"}


def test_a_planted_specialist_is_found(many_scenes: Path, tmp_path: Path) -> None:
    planted = tokens_of(open_data(many_scenes), "fruit")
    assert len(planted) >= 3
    model = small_model(partial(PlantedRouter, planted=planted))
    atlas = observe(many_scenes, model, tmp_path)
    for each in atlas.results:
        if each.found.label.name == "text/category":
            assert each.adjusted_p[0] < 1e-3
            fruit = each.found.values.index("fruit")
            assert each.found.lift_EV[0].argmax() == fruit and each.found.low_EV[0, fruit] > 3
            assert all(p > ALPHA for p in each.adjusted_p[1:])
    assert claims(atlas, ALPHA).keys() <= BY_IDENTITY | {"text/category"}


RULES = {
    "balanced": (partial(FixedRouter, rule="balanced"), BY_POSITION),
    "random": (partial(FixedRouter, rule="random"), BY_POSITION),
    "hash": (HashRouter, BY_IDENTITY),
}


@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_claimed_beyond_a_rule(rule: str, many_scenes: Path, tmp_path: Path) -> None:
    router, allowed = RULES[rule]
    found = claims(observe(many_scenes, small_model(router), tmp_path), ALPHA)
    assert found and found.keys() <= allowed


@pytest.mark.slow  # 60 atlases
@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_claimed_beyond_a_rule_in_twenty_seeds(rule: str, many_scenes: Path, tmp_path: Path) -> None:
    router, allowed = RULES[rule]
    for seed in range(20):
        seeded = partial(router, seed=seed) if rule == "hash" else router
        found = claims(observe(many_scenes, small_model(seeded), tmp_path / str(seed), draws=499, seed=seed), ALPHA)
        assert found and found.keys() <= allowed, (seed, found)
