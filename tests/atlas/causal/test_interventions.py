"""Interventions on plans: what each changes; a change that changes nothing gives the same output to the bit."""

from functools import partial

import pytest
import torch

from lightning_moevlm.atlas.causal.intervene import intervene, sparse_layers
from lightning_moevlm.atlas.causal.interventions import (
    ExpertOff,
    FrozenChoices,
    HashedChoices,
    Intervention,
    OtherSample,
    RandomChoices,
    WithoutBest,
    rank_experts,
    reorder,
)
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import Modality, PairPlan, RoutingInput
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.routers import FixedRouter, HashRouter, SoftRouter, TopKRouter
from lightning_moevlm.model.routers.choices import list_choices
from tests.model.routers.test_routers import ROUTERS, build
from tests.routing import full_plan, routing_input
from tests.small_model import pair_batch, small_decoder, small_limoe, small_moma, small_vl_moe, uneven_batch

FAMILIES = {"VLMoE": small_vl_moe, "LIMoE": small_limoe, "MoMa": small_moma, "MoEDecoder": small_decoder}
INPUTS = routing_input(16, 16, num_padding=3)


class Unchanged:
    """Every choice at its place in the token's own order."""

    reads_identity = False

    def __call__(self, plan: PairPlan, inputs: RoutingInput) -> PairPlan:
        return reorder(plan, rank_experts(plan))


def plan_of(name: str) -> PairPlan:
    plan = build(name).eval()(INPUTS)
    assert isinstance(plan, PairPlan)
    return plan


def equal(plan: PairPlan, other: PairPlan) -> bool:
    return all(
        torch.equal(getattr(plan, name), getattr(other, name))
        for name in ("token_N", "expert_N", "weight_N", "chosen_N", "kept_N")
    )


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_keeps_its_plan_or_loses_the_expert_alone(name: str) -> None:
    plan = plan_of(name)
    assert equal(reorder(plan, rank_experts(plan)), plan)
    assert equal(FrozenChoices(plan)(plan, INPUTS), plan)
    expert = int(plan.expert_N[plan.chosen_N][0])
    hit_N = plan.chosen_N & (plan.expert_N == expert)
    for to in ("next", "nothing"):
        off = ExpertOff(expert, to)(plan, INPUTS)
        assert isinstance(off, PairPlan)
        assert not bool((off.expert_N[off.chosen_N] == expert).any())
        assert equal_where(off, plan, ~hit_N), "other pairs stay as they are"
        pairs = torch.stack([off.token_N, off.expert_N])[:, off.chosen_N]
        assert pairs.unique(dim=1).shape == pairs.shape, "no token has an expert twice"
        assert torch.equal(off.kept_N, off.chosen_N)
        if to == "nothing":
            assert bool((off.weight_N[hit_N] == 0).all()) and not bool(off.chosen_N[hit_N].any())
        else:
            assert torch.equal(off.weight_N[off.chosen_N], plan.weight_N[off.chosen_N])
    for change in (WithoutBest(), RandomChoices(), HashedChoices(), OtherSample()):
        changed = change(plan, INPUTS)
        assert torch.equal(changed.chosen_N, plan.chosen_N) and torch.equal(changed.weight_N, plan.weight_N)
        assert torch.equal(changed.expert_N[~plan.chosen_N], plan.expert_N[~plan.chosen_N])
        pairs = torch.stack([changed.token_N, changed.expert_N])[:, changed.chosen_N]
        assert pairs.unique(dim=1).shape == pairs.shape


def equal_where(plan: PairPlan, other: PairPlan, pair_N: torch.Tensor) -> bool:
    return all(
        torch.equal(getattr(plan, name)[pair_N], getattr(other, name)[pair_N])
        for name in ("token_N", "expert_N", "weight_N", "chosen_N", "kept_N")
    )


def test_next_ranked_by_hand() -> None:
    # token 0 chose 2 and 0, its rank 3 is 3; token 1 chose 1 and 3, its rank 3 is 0
    logits_TE = torch.tensor([[2.0, -1.0, 3.0, 1.0], [0.5, 3.0, -1.0, 2.0]])
    plan = full_plan(logits_TE, top_k=2)
    assert list_choices(plan).tolist() == [[2, 0], [1, 3]]
    assert list_choices(ExpertOff(2)(plan, INPUTS)).tolist() == [[3, 0], [1, 3]]  # type: ignore[arg-type]
    assert list_choices(ExpertOff(3)(plan, INPUTS)).tolist() == [[2, 0], [1, 0]]  # type: ignore[arg-type]
    assert list_choices(WithoutBest()(plan, INPUTS)).tolist() == [[3, 0], [0, 3]]
    # token 1 takes the choices of token 0, best for best
    other = FrozenChoices(full_plan(logits_TE[[0, 0]], top_k=2))
    assert list_choices(other(plan, INPUTS)).tolist() == [[2, 0], [2, 0]]


def test_a_token_of_all_experts_loses_the_choice() -> None:
    plan = full_plan(torch.tensor([[1.0, 0.0]]), top_k=2)
    off = ExpertOff(0)(plan, INPUTS)
    assert isinstance(off, PairPlan)
    assert off.chosen_N.tolist() == [False, True] and off.weight_N.tolist()[0] == 0
    assert equal(WithoutBest()(plan, INPUTS), plan), "there is no rank k + 1"


def test_chance_and_hash_are_those_of_the_routers() -> None:
    plan = TopKRouter(16, 8, top_k=2)
    with torch.no_grad():
        plan.weight_ED.normal_(generator=torch.Generator().manual_seed(0))
    own = plan.eval()(INPUTS)
    by_chance, by_hash = RandomChoices()(own, INPUTS), HashedChoices()(own, INPUTS)
    valid_T = INPUTS.valid_T
    for changed, router in ((by_chance, FixedRouter(16, 8, "random", top_k=2)), (by_hash, HashRouter(16, 8, top_k=2))):
        expected = router.eval()(INPUTS)
        assert torch.equal(list_choices(changed)[valid_T], list_choices(expected)[valid_T])
    assert not equal(RandomChoices(1)(own, INPUTS), by_chance)


def test_another_sample_chooses_by_hand() -> None:
    # two samples of two patches and two words; the second has one word. Experts 0 1 2 3 | 3 2 1 -
    modality_T = torch.tensor([Modality.IMAGE, Modality.IMAGE, Modality.TEXT, Modality.TEXT] * 2)
    valid_T = torch.tensor([True] * 7 + [False])
    logits_TE = torch.eye(4)[[0, 1, 2, 3, 3, 2, 1, 0]]
    plan = full_plan(logits_TE, valid_T=valid_T)._replace(modality_T=modality_T, num_sequences=2)
    # the word that the second sample lacks is its first one again
    assert OtherSample()(plan, INPUTS).expert_N.tolist() == [3, 2, 1, 1, 0, 1, 2, 0]
    alone = plan._replace(num_sequences=1)
    assert equal(OtherSample()(alone, INPUTS), alone)


def outputs(backbone: Backbone) -> torch.Tensor:
    batch = uneven_batch(5)
    with torch.no_grad():
        return backbone(*batch[:3]).tokens_BSD


@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_that_changes_nothing_gives_equal_bits(family: str) -> None:
    backbone = FAMILIES[family](top_k=2).eval()
    before = outputs(backbone)
    for layer in sparse_layers(backbone):
        with intervene(backbone, layer, Unchanged()):
            assert torch.equal(outputs(backbone), before)
        for change in (ExpertOff(0), ExpertOff(0, "nothing"), WithoutBest(), RandomChoices(), HashedChoices()):
            with intervene(backbone, layer, change):
                outputs(backbone)
    assert torch.equal(outputs(backbone), before), "nothing is left behind"
    assert not any("patch_codes" in name for name, _ in backbone.named_modules())


@pytest.mark.parametrize(
    "change", [ExpertOff(0), ExpertOff(0, "nothing"), WithoutBest(), RandomChoices(), OtherSample()]
)
def test_a_change_acts_in_its_layer(change: Intervention) -> None:
    backbone = small_limoe().eval()
    with torch.no_grad():
        for layer in sparse_layers(backbone).values():
            for stack in layer.experts.stacks():
                stack.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    before = backbone(*pair_batch()[:3])
    first, last = sparse_layers(backbone)
    with torch.no_grad(), intervene(backbone, last, change):
        after = backbone(*pair_batch()[:3])
    assert not torch.equal(after.tokens_BSD, before.tokens_BSD)
    plans = [{named.layer: named.plan for named in output.plans} for output in (before, after)]
    assert equal(plans[0][first], plans[1][first]) and not equal(plans[0][last], plans[1][last])


def test_soft_slots_lose_an_expert() -> None:
    backbone = small_limoe(router=partial(SoftRouter, slots_per_expert=1)).eval()
    layer = next(iter(sparse_layers(backbone)))
    before = outputs(backbone)
    with intervene(backbone, layer, ExpertOff(1, "nothing")):
        assert not torch.equal(outputs(backbone), before)
    for change in (ExpertOff(1), WithoutBest()):
        with intervene(backbone, layer, change), pytest.raises(UserError, match="soft slots"):
            outputs(backbone)


def test_models_in_training_and_unknown_layers_are_refused() -> None:
    backbone = small_limoe()
    with pytest.raises(UserError, match=r"backbone.eval\(\)"), intervene(backbone, "blocks.1.ffn", WithoutBest()):
        pass
    with (
        pytest.raises(UserError, match="has no experts: choose one of"),
        intervene(backbone.eval(), "x", WithoutBest()),
    ):
        pass
