"""A planted specialist is found; of routers with a rule, nothing is claimed beyond it."""

from functools import partial
from pathlib import Path

import pytest

from lightning_moevlm.atlas.make_atlas import Atlas
from lightning_moevlm.atlas.statistics.claims import ALPHA
from lightning_moevlm.model.routers import FixedRouter, HashRouter
from tests.atlas.observed import claims, observe, small_model

BY_POSITION = {"image/position", "text/position"}
BY_IDENTITY = {"text/word", "text/object", "image/colour"}


def test_a_planted_specialist_is_found(planted: Atlas) -> None:
    for layer in planted.of_layers:
        for found, p_E in zip(layer.results, layer.adjusted, strict=True):
            if found.label.name == "text/category":
                assert p_E[0] < 1e-3 and (p_E[1:] > ALPHA).all()
                fruit = found.values.index("fruit")
                assert found.lift_EV[0].argmax() == fruit and found.low_EV[0, fruit] > 3
        assert layer.claims[0][0][:2] == ("text/category", "fruit")
    assert claims(planted) <= BY_IDENTITY | {"text/category"}


RULES = {
    "balanced": (partial(FixedRouter, rule="balanced"), BY_POSITION),
    "random": (partial(FixedRouter, rule="random"), BY_POSITION),
    "hash": (HashRouter, BY_IDENTITY),
}


@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_claimed_beyond_a_rule(rule: str, many_scenes: Path, tmp_path: Path) -> None:
    router, allowed = RULES[rule]
    found = claims(observe(many_scenes, small_model(router), tmp_path))
    assert found and found <= allowed


@pytest.mark.slow  # 60 atlases
@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_claimed_beyond_a_rule_in_twenty_seeds(rule: str, many_scenes: Path, tmp_path: Path) -> None:
    router, allowed = RULES[rule]
    for seed in range(20):
        seeded = partial(router, seed=seed) if rule == "hash" else router
        found = claims(
            observe(many_scenes, small_model(seeded), tmp_path / str(seed), draws=199, seed=seed, samples=200)
        )
        assert found and found <= allowed, (seed, found)
