"""A planted specialist is found; of routers with a rule, nothing is claimed beyond it."""

from functools import partial
from pathlib import Path

import pytest

from lightning_moevlm.atlas.causal.roles import Need
from lightning_moevlm.atlas.make_atlas import Atlas
from lightning_moevlm.atlas.statistics.claims import ALPHA
from lightning_moevlm.model.routers import FixedRouter, HashRouter
from tests.atlas.observed import NUM_EXPERTS, claims, examine_atlas, observe, small_model

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


@pytest.mark.slow  # 60 atlases, and the removals of 240 experts
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_claimed_beyond_a_rule_in_twenty_seeds(rule: str, many_scenes: Path, tmp_path: Path) -> None:
    """Neither of what an expert serves nor of what it is needed for."""
    router, allowed = RULES[rule]
    for seed in range(20):
        model = small_model(partial(router, seed=seed) if rule == "hash" else router)
        folder = tmp_path / str(seed)
        atlas = observe(many_scenes, model, folder, draws=199, seed=seed, samples=200)
        found = claims(atlas)
        assert found and found <= allowed, (seed, found)
        needs = examine_atlas(many_scenes, model, atlas, folder)
        assert len(needs.roles) == NUM_EXPERTS and any(role.hurts for role in needs.roles), "removals do harm"
        needed = {claim.serves.group for claim in needs.claims if claim.need is Need.SPECIFIC}
        assert needed == {each.group for role in needs.roles for each in role.needed_for}
        kinds = tuple(f"{label.rpartition('/')[2]} " for label in allowed)
        assert all(group.startswith(kinds) for group in needed), (seed, needed)
