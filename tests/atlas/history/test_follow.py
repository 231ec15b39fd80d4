"""Routing is followed over checkpoints and compared between runs, on the tokens of one probe."""

from functools import partial
from pathlib import Path

import pytest

from lightning_moevlm.atlas.causal.intervene import sparse_layers
from lightning_moevlm.atlas.history.follow import Place, compare_runs, follow
from lightning_moevlm.atlas.history.frozen import freeze_choices
from lightning_moevlm.atlas.probe.probe_set import ProbeSet
from lightning_moevlm.atlas.routing.trace import TracedLayer
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.backbones import LIMoE, VLMoE
from lightning_moevlm.model.layers import MoEFFN
from lightning_moevlm.model.objectives import Draws, MaskedModelling
from lightning_moevlm.model.routers import FixedRouter, HashRouter
from tests.atlas.causal.test_scores import Remember
from tests.atlas.observed import NUM_EXPERTS, SIZES, PlantedRouter, open_data, small_model, tokens_of
from tests.small_model import small_limoe


def test_a_specialist_that_comes_about_is_seen(many_scenes: Path, tmp_path: Path) -> None:
    data = open_data(many_scenes)
    probe = ProbeSet(data, "train", 80, 0)
    models = {
        "early": small_model(partial(HashRouter, seed=1)),
        "late": small_model(partial(PlantedRouter, planted=tokens_of(data, "fruit"))),
    }
    objective = MaskedModelling(models["late"].spec)
    course = [(30, Path("late")), (10, Path("early")), (20, Path("early"))]
    found = follow(lambda file: models[file.name], course, objective, probe, tmp_path)
    assert found.steps == (10, 20, 30) and not [*tmp_path.iterdir()]
    assert {place.modality for place in found.settling} == {"image", "text"}
    for place, settling in found.settling.items():
        first, second, last = settling.points
        assert first.saturation == second.saturation < last.saturation == 1
        # of 4 experts about a quarter of the choices agree by chance; expert 0 has few tokens at the end
        assert first.saturation == pytest.approx(first.by_chance, abs=0.25)
        assert second.fluctuation == 0 and last.fluctuation is not None and last.fluctuation > 0.5
        if place.modality == "image":  # the specialist is for words alone
            assert [(turn.step, turn.expert, turn.kind) for turn in settling.turns] == [(30, 0, "death")]
    for layer in {place.layer for place in found.settling}:
        first, second, last = found.specialisation[layer, "text/category"]
        assert first[1:] == second[1:] and last.step == 30
        assert last.nmi - last.by_chance > first.nmi - first.by_chance + 0.02


def test_runs_are_compared_by_their_tokens(many_scenes: Path, tmp_path: Path) -> None:
    probe = ProbeSet(open_data(many_scenes), "train", 60, 0)

    def compare(first: LIMoE, second: LIMoE) -> dict[Place, float]:
        objectives = (MaskedModelling(first.spec), MaskedModelling(second.spec))
        found = compare_runs(first, second, objectives, probe, tmp_path, draws=19)
        assert all(len(each.partner) == NUM_EXPERTS for each in found.values())
        return {place: each.positions.repeats for place, each in found.items()}

    by_hash = small_model(HashRouter)
    assert set(compare(by_hash, by_hash).values()) == {1.0}
    other = compare(by_hash, small_model(partial(FixedRouter, rule="random")))
    assert all(abs(repeats) < 0.1 for repeats in other.values())


def test_one_checkpoint_and_other_sizes_are_refused(many_scenes: Path, tmp_path: Path) -> None:
    probe, model = ProbeSet(open_data(many_scenes), "train", 8, 0), small_model(HashRouter)
    objective = MaskedModelling(model.spec)
    with pytest.raises(UserError, match="needs two checkpoints of different steps, and the run has 1"):
        follow(lambda file: model, [(5, Path("a")), (5, Path("b"))], objective, probe, tmp_path)
    with pytest.raises(UserError, match="cut samples otherwise"):
        compare_runs(model, small_limoe(), (objective, objective), probe, tmp_path)  # type: ignore[arg-type]
    moe = partial(MoEFFN, num_experts=NUM_EXPERTS, router=HashRouter)
    other = VLMoE(dim=16, num_heads=2, num_blocks=2, num_vl_blocks=0, hidden_dim=16, patch_size=8, moe=moe, **SIZES)
    with pytest.raises(UserError, match=r"no layer of experts in common, blocks\.1\.ffn and blocks\.1\.ffn\.image, "):
        compare_runs(model, other, (objective, objective), probe, tmp_path)


def test_choices_of_an_earlier_model_do_harm_and_its_own_do_none(many_scenes: Path, tmp_path: Path) -> None:
    data = open_data(many_scenes)
    probe = ProbeSet(data, "train", 40, 0)
    other, model = small_model(HashRouter).eval(), small_model(partial(HashRouter, seed=1)).eval()
    other.load_state_dict(model.state_dict())
    layers = [TracedLayer(path, 0, NUM_EXPERTS, False) for path in sparse_layers(model)]
    models = {"other": other, "own": model}
    course = [(20, Path("own")), (10, Path("other"))]
    found = freeze_choices(
        model, Remember(model).eval(), Draws(0), lambda file: models[file.name], course, probe, layers
    )
    assert [*found] == [(step, layer.layer) for step in (10, 20) for layer in layers]
    for (step, _), effect in found.items():
        assert effect.mean == 0 if step == 20 else effect.mean > 0 and effect.p_adjusted < 0.001
