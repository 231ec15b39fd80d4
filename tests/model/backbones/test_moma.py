"""MoMa: groups of experts by modality, expert choice inside them, causal training."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.step_records import NamedPlan
from lightning_moevlm.model import routers
from lightning_moevlm.model.backbones import MoMa
from lightning_moevlm.model.experts import ExpertStack, GatedExperts, MLPExperts
from lightning_moevlm.model.layers import MoEFFN
from lightning_moevlm.model.objectives import NextToken
from lightning_moevlm.model.routers import ExpertChoiceRouter, Router, TopKRouter
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.checkpoints.init_from import InitFrom, Upcycle, load_initial_weights, measure_upcycling
from tests.small_model import pair_batch, small_moe, small_moma, uneven_batch
from tests.training.small_fit import fit

CHOICE = partial(ExpertChoiceRouter, score="sigmoid")
SMALL = partial(MoMa, dim=32, num_heads=2, image_size=16, patch_size=8, vocab_size=300, max_text_len=8)


def plans(model: MoMa, batch: Batch) -> tuple[NamedPlan, ...]:
    found: tuple[NamedPlan, ...] = model(batch.images_BRYX, batch.text_BL, batch.text_mask_BL).plans
    return found


def test_each_modality_has_its_group_in_every_block() -> None:
    grouped, mixed = (plans(small_moma(is_grouped=on), pair_batch()) for on in (True, False))
    assert [(plan.layer, plan.modalities) for plan in grouped] == [
        (f"blocks.{block}.ffn.{modality.label}", (modality,))
        for block in (0, 1)
        for modality in (Modality.IMAGE, Modality.TEXT)
    ]
    assert [(plan.layer, plan.modalities) for plan in mixed] == [
        (f"blocks.{block}.ffn", (Modality.IMAGE, Modality.TEXT)) for block in (0, 1)
    ]


def test_experts_choose_within_their_modality_and_have_equal_loads() -> None:
    # 8 images of 4 patches and 8 texts of 3 to 7 tokens: 4 experts take a quarter of each
    batch = uneven_batch(8)
    assert batch.text_mask_BL is not None
    words = int(batch.text_mask_BL.sum())
    for named in plans(small_moma(router=CHOICE), batch):
        plan = named.plan
        tokens = 8 * 4 if named.modalities == (Modality.IMAGE,) else words
        load_E = torch.bincount(plan.expert_N[plan.chosen_N], minlength=4)
        assert load_E.tolist() == [-(-tokens // 4)] * 4
        assert set(plan.modality_T[plan.token_N[plan.chosen_N]].tolist()) == {int(named.modalities[0])}


def test_one_expert_takes_every_token_and_its_router_learns() -> None:
    model, batch = small_moma(num_experts=1, router=CHOICE), uneven_batch(4)
    output = model(batch.images_BRYX, batch.text_BL, batch.text_mask_BL)
    for named in output.plans:
        assert int(named.plan.chosen_N.sum()) == int(named.plan.valid_T.sum())
    output.tokens_BSD.square().sum().backward()
    layers = [module for module in model.modules() if isinstance(module, MoEFFN)]
    assert len(layers) == 4
    assert all(layer.router.weight_ED.grad is not None and layer.router.weight_ED.grad.any() for layer in layers)


def test_groups_may_differ_in_size() -> None:
    one, seven = (small_moe(num_experts=number) for number in (1, 7))
    model = SMALL(num_blocks=1, moe=one, text_moe=seven)
    assert [module.num_experts for module in model.modules() if isinstance(module, MoEFFN)] == [1, 7]
    with pytest.raises(UserError, match="text_moe describes the text experts of a grouped MoMa"):
        SMALL(num_blocks=1, moe=one, text_moe=seven, is_grouped=False)


def test_a_group_grows_from_its_only_expert(tmp_path: Path) -> None:
    # section 2.5 of the paper: 1t1i is trained first, then each of its experts is copied
    def module(
        num_experts: int, experts: type[ExpertStack], router: Callable[[int, int], Router]
    ) -> VisionLanguageModule:
        moe = partial(MoEFFN, num_experts=num_experts, router=router, experts=partial(experts, hidden_dim=24))
        return VisionLanguageModule(SMALL(num_blocks=1, moe=moe), seed=num_experts, init_std=0.1)

    path = tmp_path / "1t1i.ckpt"
    one = module(1, GatedExperts, TopKRouter)
    fit(one, 1, save_to=path)
    four = module(4, GatedExperts, partial(TopKRouter, top_k=2, renormalise=True))
    loaded = load_initial_weights(four, InitFrom(str(path), upcycle=Upcycle()))
    assert len(loaded.upcycled) == 6 and max(measure_upcycling(four, loaded).values()) < 1e-5  # three stacks a modality
    for expert in four.backbone.blocks[0].ffn.text.experts.gate_EDF:  # type: ignore[union-attr]
        assert torch.equal(expert, one.backbone.blocks[0].ffn.text.experts.gate_EDF[0])  # type: ignore[union-attr]
    fit(module(1, MLPExperts, TopKRouter), 1, save_to=path)
    with pytest.raises(UserError, match=r"image\.experts\.gate_EDF has no counterpart .* choose experts of its kind"):
        load_initial_weights(four, InitFrom(str(path), upcycle=Upcycle()))


def test_a_causal_objective_refuses_expert_choice_and_names_the_routers_that_it_takes() -> None:
    with pytest.raises(UserError, match="cannot use ExpertChoiceRouter: its tokens compete") as refusal:
        VisionLanguageModule(small_moma(router=CHOICE), NextToken)
    found = (getattr(routers, name) for name in routers.__all__)
    ours = [each for each in found if issubclass(each, Router) and each is not Router]
    for router in ours:
        assert (router.__name__ in str(refusal.value).partition("token by token")[2]) is not router.competes
    VisionLanguageModule(small_moma(), NextToken)
