"""Revival of dead experts by hand: dead experts, revived weights, refused routers."""

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.routers import ExpertChoiceRouter, FixedRouter, SoftRouter
from lightning_moevlm.training import Actions
from lightning_moevlm.training.actions import ReviveDeadExperts, build_actions
from lightning_moevlm.training.actions.revive_experts import ExpertReviver, copy_expert
from tests.small_model import pair_batch, small_vl_moe
from tests.training.by_hand import LEARNED, OPTIMIZERS, PATH, facts, training_of, update


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("router", LEARNED)
def test_a_revived_expert_is_a_noisy_copy_without_a_past(router: str, optimizer_name: str) -> None:
    backbone = small_vl_moe(router=LEARNED[router])
    optimizer = OPTIMIZERS[optimizer_name](backbone.parameters())
    for _ in range(2):
        update(backbone, optimizer)
        optimizer.step()
    layer = backbone.blocks[1].ffn.image
    tensors = [(stack, 0) for stack in layer.experts.stacks()] + list(layer.router.per_expert())
    old = [tensor.detach().clone() for tensor, _ in tensors]
    pasts = [
        [(value, value.clone(), axis) for value in optimizer.state[tensor].values() if value.ndim > 0]
        for tensor, axis in tensors
        if tensor.requires_grad
    ]
    copy_expert(layer, 2, 0, 0.1, torch.Generator().manual_seed(0), [optimizer])
    for (tensor, axis), before in zip(tensors, old, strict=True):
        assert torch.equal(tensor.select(axis, 1), before.select(axis, 1))
        assert torch.equal(tensor.select(axis, 2), before.select(axis, 2))
        error = tensor.detach().select(axis, 0) - before.select(axis, 2)
        if tensor.requires_grad:
            assert float(error.std() / before.select(axis, 2).std()) == pytest.approx(0.1, rel=0.4)
        else:
            assert not bool(error.any())
    assert all(len(past) == (2 if optimizer_name == "AdamW" else 1) for past in pasts)
    for value, before, axis in (entry for past in pasts for entry in past):
        assert not bool(value.select(axis, 0).any()) and bool(before.any())
        rest = [place for place in range(4) if place != 0]
        at = torch.tensor(rest)
        assert torch.equal(value.index_select(axis, at), before.index_select(axis, at))


def test_an_expert_is_dead_after_so_many_steps_without_a_token() -> None:
    backbone = small_vl_moe()
    training = training_of(backbone)
    reviver = ExpertReviver(ReviveDeadExperts(idle_steps=3, every_n_steps=1))
    loads = [[5, 0, 9, 1], [5, 0, 9, 0], [0, 0, 0, 0], [5, 0, 9, 0], [5, 0, 9, 0]]
    # the third step routed nothing here and counts for nobody: expert 1 is idle for 3 steps after the fourth, expert 3
    # after the fifth
    events = [reviver.after_step(training, facts(step, load)) for step, load in enumerate(loads, start=1)]
    assert events[:3] == [{}, {}, {}]
    assert events[3] == events[4] == {f"action/revived_experts/{PATH}": 1.0}
    up_EDF = backbone.blocks[1].ffn.image.experts.up_EDF.detach()
    for revived in (1, 3):  # copies of the busiest
        assert float((up_EDF[revived] - up_EDF[2]).std()) < 0.2 * float(up_EDF[2].std())
    assert float((up_EDF[0] - up_EDF[2]).std()) > float(up_EDF[2].std())


def test_several_dead_experts_copy_different_ones() -> None:
    backbone = small_vl_moe()
    reviver = ExpertReviver(ReviveDeadExperts(idle_steps=1, noise=1e-4, every_n_steps=1))
    before = backbone.blocks[1].ffn.image.experts.up_EDF.detach().clone()
    assert reviver.after_step(training_of(backbone), facts(1, [0, 3, 7, 0])) == {f"action/revived_experts/{PATH}": 2.0}
    after = backbone.blocks[1].ffn.image.experts.up_EDF.detach()
    torch.testing.assert_close(after[[0, 3]], before[[2, 1]], atol=1e-4, rtol=1e-2)


def test_counting_continues_from_a_checkpoint_and_checks_every_n_steps() -> None:
    backbone = small_vl_moe()
    options = ReviveDeadExperts(idle_steps=2, every_n_steps=2)
    one, two = ExpertReviver(options), ExpertReviver(options)
    assert one.after_step(training_of(backbone), facts(1, [1, 0, 1, 1])) == {}
    two.load_state_dict(one.state_dict())
    assert two.after_step(training_of(backbone), facts(2, [1, 0, 1, 1])) != {}
    assert two.after_step(training_of(backbone), facts(3, [1, 0, 1, 1])) == {}
    late = ExpertReviver(options, last_step=3)  # routers stand still from step 4 on
    assert not any(late.after_step(training_of(backbone), facts(step, [1, 0, 1, 1])) for step in (3, 4, 6))


def test_a_revived_expert_gets_tokens() -> None:
    backbone, batch = small_vl_moe(), pair_batch(32)
    layer = backbone.blocks[1].ffn.image

    def load() -> list[int]:
        plan = next(plan.plan for plan in backbone(batch.images_BRYX).plans if plan.layer == PATH)
        return plan.chosen_loads()[0].tolist()

    order = sorted(range(4), key=load().__getitem__)
    with torch.no_grad():  # no token likes this expert any more: its logit is the lowest of all
        layer.router.weight_ED[order[0]] = -10 * layer.router.weight_ED[order[1:]].mean(dim=0)
    copy_expert(layer, order[-1], order[0], 0.1, torch.Generator().manual_seed(0), [])
    after = load()
    assert after[order[0]] > 0 and after[order[-1]] > 0


def test_reviving_needs_a_router_with_rows_per_expert() -> None:
    backbone = small_vl_moe(router=FixedRouter)
    with pytest.raises(UserError, match="cannot act with FixedRouter, which has no learned row per expert"):
        build_actions(Actions(revive_dead_experts=ReviveDeadExperts()), backbone)
    for router in (SoftRouter, ExpertChoiceRouter):
        even = small_vl_moe(router=router)
        with pytest.raises(UserError, match=f"has no effect with {router.__name__}, which gives every expert the same"):
            build_actions(Actions(revive_dead_experts=ReviveDeadExperts()), even)
    dense = small_vl_moe(sparse_modalities=(), router=FixedRouter)
    assert set(build_actions(Actions(revive_dead_experts=ReviveDeadExperts()), dense)) == {"revive_dead_experts"}
