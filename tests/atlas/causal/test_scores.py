"""Scores of single samples: they add up to the loss, are paired, and find what a planted specialist is needed for."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_moevlm.atlas.causal.effects import group_effects
from lightning_moevlm.atlas.causal.intervene import sparse_layers
from lightning_moevlm.atlas.causal.interventions import ExpertOff, RandomChoices
from lightning_moevlm.atlas.causal.scores import Change, score_samples
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.routing_plan import PairPlan, RoutingInput
from lightning_moevlm.contracts.step_records import ObjectiveOutput, SampleLosses, Term
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.objectives import Draws, MaskedModelling, Objective
from lightning_moevlm.model.routers import Router
from lightning_moevlm.model.routers.choices import even_plan
from tests.small_model import pair_batch, small_limoe
from tests.training.grid import IMAGES, OBJECTIVES, PAIRS, build
from tests.training.small_fit import NoTask

DRAWS = Draws(3)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_of_samples_add_up_to_the_terms(name: str) -> None:
    module = build("LIMoE", OBJECTIVES[name].objective).eval()
    with torch.no_grad():
        output = module.objective(module.backbone, PAIRS, DRAWS)
    assert output.of_samples.keys() == output.terms.keys()
    for term, losses in output.of_samples.items():
        torch.testing.assert_close(losses.loss_M.mean(), output.terms[term].raw)
        assert losses.row_M.shape == losses.loss_M.shape and losses.row_M.dtype == torch.int64
        assert set(losses.keys) == set(PAIRS.keys) and int(losses.row_M.max()) < len(losses.keys)
        if losses.right_M is not None:
            assert bool(((losses.right_M >= 0) & (losses.right_M <= 1)).all())
        if term in output.predictions:
            predicted_M, target_M = output.predictions[term]
            assert losses.right_M is not None
            torch.testing.assert_close(losses.right_M.mean(), (predicted_M == target_M).float().mean())
    module.train()
    assert not module.objective(module.backbone, PAIRS, DRAWS).of_samples


def test_a_sample_scores_alone_as_in_its_batch() -> None:
    module = build("LIMoE", MaskedModelling).eval()
    layer = next(iter(sparse_layers(module.backbone)))
    changes = {"off": Change(layer, ExpertOff(0)), "other": Change(layer, choices_of=module.backbone)}
    together = score_samples(module.objective, module.backbone, [PAIRS], DRAWS, changes)
    alone = [PAIRS.select([row]) for row in range(PAIRS.num_samples)]
    apart = score_samples(module.objective, module.backbone, alone, DRAWS, changes)
    assert together.keys == apart.keys == PAIRS.keys
    np.testing.assert_allclose(together.unchanged.loss_N, apart.unchanged.loss_N, rtol=1e-5)
    np.testing.assert_allclose(together.changed["off"].loss_N, apart.changed["off"].loss_N, rtol=1e-5)
    assert np.array_equal(together.changed["other"].loss_N, together.unchanged.loss_N), "its own choices"
    assert together.unchanged.right.keys() == {"text", "pair_text"}


def test_samples_that_the_objective_cannot_use_have_no_score() -> None:
    module = build("LIMoE", OBJECTIVES["NextToken"].objective).eval()
    scored = score_samples(module.objective, module.backbone, [IMAGES, PAIRS], DRAWS, {})
    assert scored.keys == IMAGES.keys + PAIRS.keys
    assert np.isnan(scored.unchanged.loss_N[:8]).all() and np.isfinite(scored.unchanged.loss_N[8:]).all()
    assert np.isnan(scored.unchanged.right["caption"][:8]).all()


class Planted(Router):
    """Texts with a word below 100 go to expert 0, the others in turn to the other experts."""

    reads_identity = True
    experts_per_token = 1.0  # type: ignore[assignment]

    def forward(self, inputs: RoutingInput) -> PairPlan:
        assert inputs.identity_T is not None
        identity_BS = inputs.identity_T.view(inputs.num_sequences, -1)
        is_planted_B = ((identity_BS >= 10) & (identity_BS < 100)).any(dim=1)
        other_T = 1 + inputs.identity_T % (self.num_experts - 1)
        planted_T = is_planted_B.repeat_interleave(identity_BS.shape[1])
        return even_plan(inputs, torch.where(planted_T, 0, other_T).unsqueeze(-1), self.num_experts)


class Remember(Objective):
    """The loss is the distance to the features of the model as it was: whatever changes them does harm."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.num_classes = {}
        self.seen: dict[str, Tensor] = {}

    def forward(self, backbone: Backbone, batch: Batch, draws: Draws) -> ObjectiveOutput:
        output = backbone(*batch[:3])
        features_BX = output.tokens_BSD.flatten(1)
        for key, feature_X in zip(batch.keys, features_BX, strict=True):
            self.seen.setdefault(key, feature_X)
        loss_B = (features_BX - torch.stack([self.seen[key] for key in batch.keys])).square().mean(dim=1)
        of_samples = {"distance": SampleLosses(batch.keys, torch.arange(len(loss_B)), loss_B, None)}
        return ObjectiveOutput({"distance": Term(loss_B.mean(), 2.0)}, {}, output.plans, 0, of_samples=of_samples)


def test_a_planted_specialist_is_needed_for_its_category_alone() -> None:
    backbone = small_limoe(router=Planted, num_experts=4).eval()
    batch = pair_batch(24)
    assert batch.text_BL is not None
    text_BL = batch.text_BL.clone()
    is_planted_N = np.arange(24) % 2 == 0
    words_BL = text_BL[:, 1:6]
    text_BL[:, 1:6] = torch.where(torch.from_numpy(is_planted_N)[:, None], words_BL % 90 + 10, words_BL % 200 + 100)
    layer = list(sparse_layers(backbone))[-1]
    changes = {f"expert {expert} off": Change(layer, ExpertOff(expert, "nothing")) for expert in range(4)}
    batches = [batch._replace(text_BL=text_BL).select(range(start, start + 8)) for start in (0, 8, 16)]
    scored = score_samples(Remember(backbone).eval(), backbone, batches, DRAWS, changes)
    groups = {"planted": is_planted_N, "others": ~is_planted_N}
    found = {(each.change, each.group): each for each in group_effects(scored, groups)}
    specialist = found["expert 0 off", "planted"]
    assert specialist.loss.interval is not None and specialist.loss.interval.low > 0
    assert specialist.loss.p_adjusted < 0.001
    assert specialist.more is not None and specialist.more.p_adjusted < 0.001
    spared = found["expert 0 off", "others"]
    assert spared.loss.mean == 0 and spared.loss.p == 1
    for expert in (1, 2, 3):
        assert found[f"expert {expert} off", "planted"].loss.mean == 0
        assert found[f"expert {expert} off", "others"].loss.mean > 0


def test_objectives_without_losses_of_samples_are_refused() -> None:
    backbone = small_limoe().eval()
    with pytest.raises(UserError, match="NoTask gives no losses of these samples"):
        score_samples(NoTask(backbone.spec).eval(), backbone, [pair_batch()], DRAWS, {})


def test_a_layer_that_is_not_there_is_refused() -> None:
    module = build("LIMoE", MaskedModelling).eval()
    with pytest.raises(UserError, match="has no experts"):
        score_samples(module.objective, module.backbone, [PAIRS], DRAWS, {"x": Change("blocks.9", RandomChoices())})
