"""Each action by hand, on models and optimisers alone."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.sequence_layout import Layout, Span
from lightning_moevlm.contracts.step_records import AttentionLogits, NamedPlan
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.layers import Attention, ModelStabilisers, MoEFFN, initialise
from lightning_moevlm.training import Actions, VisionLanguageModule
from lightning_moevlm.training.actions import FreezeRouter, QKClip, ReviveDeadExperts, Rollback, build_actions
from lightning_moevlm.training.actions.freeze_router import RouterFreezer
from lightning_moevlm.training.actions.qk_clip import clip_heads
from lightning_moevlm.training.actions.rollback import SnapshotRing, is_bad
from lightning_moevlm.training.actions.step_facts import FactCollector
from lightning_moevlm.training.step.routing_counts import RoutingCounter
from tests.routing import top_1_plan
from tests.small_model import small_vl_moe
from tests.training.by_hand import LEARNED, OPTIMIZERS, PATH, facts, training_of, update

# QK-clip


def test_qk_clip_by_hand() -> None:
    # heads with largest logits 200, 50, 400 at threshold 100: gamma 1/2, 1, 1/4; both weights by its root
    attention = Attention(12, 3, ModelStabilisers(qk_norm=False))
    initialise(attention, seed=0, std=0.3)
    before = attention.query_key_value.weight.detach().clone().view(3, 3, 4, 12)
    gamma_H = clip_heads(attention, torch.tensor([200.0, 50.0, 400.0]), 100.0)
    assert gamma_H.tolist() == [0.5, 1.0, 0.25]
    after = attention.query_key_value.weight.detach().view(3, 3, 4, 12)
    for head, factor in enumerate([math.sqrt(0.5), 1.0, 0.5]):
        torch.testing.assert_close(after[:2, head], before[:2, head] * factor)
    assert torch.equal(after[2], before[2]) and torch.equal(after[:2, 1], before[:2, 1])


@pytest.mark.parametrize("logit_cap", [None, 1.0])
def test_clipped_heads_have_their_largest_logit_at_the_threshold(logit_cap: float | None) -> None:
    attention = Attention(16, 4, ModelStabilisers(qk_norm=False, logit_cap=logit_cap))
    initialise(attention, seed=0, std=0.5)
    tokens = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    layout = Layout((Span(Modality.TEXT, 0, 6),), torch.ones(2, 6, dtype=torch.bool))
    before = attention(tokens, layout, measure=True).logit_max_H
    assert before is not None
    threshold = float(before.sort().values[1:3].mean())  # between the second and the third head
    clip_heads(attention, before, threshold)
    after = attention(tokens, layout, measure=True).logit_max_H
    torch.testing.assert_close(after, before.clamp(max=threshold))


def test_a_logit_that_is_no_number_leaves_its_head_alone() -> None:
    attention = Attention(8, 2, ModelStabilisers(qk_norm=False))
    initialise(attention, seed=0, std=0.5)
    before = attention.query_key_value.weight.detach().clone()
    assert clip_heads(attention, torch.tensor([torch.nan, torch.inf]), 1.0).tolist() == [1.0, 1.0]
    assert torch.equal(attention.query_key_value.weight, before)


def test_qk_clip_and_qk_norm_are_refused_together() -> None:
    with pytest.raises(UserError, match=r"the norm removes the scale .* set .*stabilisers\.qk_norm to false"):
        VisionLanguageModule(small_vl_moe(), actions=Actions(qk_clip=QKClip()))
    VisionLanguageModule(small_vl_moe(stabilisers=ModelStabilisers(qk_norm=False)), actions=Actions(qk_clip=QKClip()))


# what a step showed


def test_facts_are_gathered_over_micro_batches_and_ranks() -> None:
    backbone = small_vl_moe()
    counter = RoutingCounter(backbone)
    gatherer = FactCollector(backbone, frozenset({"load", "attention", "loss"}), counter)
    plan = top_1_plan(torch.eye(4)[[0, 0, 3]], valid_T=torch.tensor([True, True, True]))
    for max_H, loss in (([1.0, 5.0], 1.0), ([3.0, 2.0], 3.0)):
        logits = AttentionLogits("pair", 0, "blocks.0.attention", torch.tensor(max_H))
        counter.add(6, [NamedPlan("image", 1, PATH, (Modality.IMAGE,), plan)])
        gatherer.add([logits], torch.tensor(loss))

    def of_two_ranks(tensor: Tensor, operation: str) -> Tensor:  # the other one saw the same
        return tensor * 2 if operation == "sum" else tensor

    step = gatherer.finish(7, torch.device("cpu"), of_two_ranks)
    # two micro-batches of two ranks: experts 0 and 3 get 2 and 1 image tokens in each
    assert step.load[PATH].tolist() == [[8, 0, 0, 4], [0, 0, 0, 0]]
    assert step.load["blocks.1.ffn.text"].tolist() == [[0] * 4] * 2  # no text here; other ranks may have had some
    assert step.attention["blocks.0.attention"].tolist() == [3.0, 5.0]
    assert step.attention["blocks.1.attention"].tolist() == [-torch.inf] * 2
    assert float(step.loss) == 2.0 and step.step == 7
    counter.add(7, [])
    gatherer.add([AttentionLogits("pair", 0, "blocks.0.attention", torch.zeros(2))], torch.tensor(0.0))
    assert int(gatherer.finish(8, torch.device("cpu"), of_two_ranks).load[PATH].sum()) == 0  # it starts anew


# frozen routers


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("router", LEARNED)
def test_frozen_routers_do_not_move_by_decay_or_momentum(router: str, optimizer_name: str) -> None:
    backbone = small_vl_moe(router=LEARNED[router])
    optimizer = OPTIMIZERS[optimizer_name](backbone.parameters())
    freezer = RouterFreezer(FreezeRouter(after_steps=2))
    training = training_of(backbone, optimizer)
    routers = [module.router for module in backbone.modules() if isinstance(module, MoEFFN)]
    states = []
    for step in range(1, 5):
        update(backbone, optimizer)
        freezer.before_step(training, step)
        optimizer.step()
        states.append([parameter.detach().clone() for router in routers for parameter in router.parameters()])
        expected = {"action/router_frozen": 1.0} if step == 3 else {}
        assert freezer.after_step(training, facts(step)) == expected
    assert all(not torch.equal(one, two) for one, two in zip(states[0], states[1], strict=True))
    assert all(torch.equal(one, two) for one, two in zip(states[1], states[3], strict=True))
    assert all(p.requires_grad for router in routers for p in router.parameters())  # as data-parallel training needs
    moved = backbone.blocks[0].attention.out.weight.grad
    assert moved is not None and bool(moved.any())  # the rest goes on learning


def test_a_frozen_router_does_not_rebalance_either() -> None:
    backbone = small_vl_moe(router=LEARNED["sigmoid with bias"])
    actions = build_actions(Actions(freeze_router=FreezeRouter(after_steps=1)), backbone)
    bias_AE = backbone.blocks[1].ffn.image.router.bias_AE
    values = []
    for step in (1, 2):
        actions["rebalance"].after_step(training_of(backbone), facts(step, [4, 0, 0, 0]))
        values.append(bias_AE.clone())
    assert bool(values[0].any()) and torch.equal(values[0], values[1])


# rollback


def test_bad_losses_by_hand() -> None:
    # mean 2, std sqrt(2/3) = 0.816: the bound at 3 std is 4.449
    options = Rollback(spike_threshold=3.0, window=3)
    assert not is_bad(4.44, [1.0, 2.0, 3.0], options) and is_bad(4.46, [1.0, 2.0, 3.0], options)
    assert not is_bad(100.0, [1.0, 2.0], options)  # too few to tell
    assert is_bad(math.nan, [], options) and is_bad(math.inf, [], options)
    assert not is_bad(100.0, [1.0, 2.0, 3.0], Rollback(spike_threshold=None, window=3))


def trained(backbone: Backbone, optimizer: Optimizer, steps: int) -> None:
    for _ in range(steps):
        update(backbone, optimizer)
        optimizer.step()


def test_going_back_restores_weights_and_optimiser_to_the_bit() -> None:
    backbone = small_vl_moe()
    optimizer = AdamW(backbone.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    training = training_of(backbone, optimizer)._replace(schedulers=[schedule])
    ring = SnapshotRing(Rollback(every_n_steps=2, keep=2, lookback=2, window=3, max_rollbacks=2))
    ring.start(training, 0)
    wanted = {}
    for step in range(1, 6):
        trained(backbone, optimizer, 1)
        schedule.step()
        assert ring.rewind(training, facts(step)) == {}
        ring.after_step(training, facts(step))
        wanted[step] = [parameter.detach().clone() for parameter in backbone.parameters()]
    # snapshots after 2 and 4 are in the ring; at step 6, both are 2 steps old or more: back to 4
    trained(backbone, optimizer, 1)
    assert ring.rewind(training, facts(6, loss=math.nan)) == {"action/rollback_to_step": 4.0}
    assert all(torch.equal(p, old) for p, old in zip(backbone.parameters(), wanted[4], strict=True))
    assert optimizer.param_groups[0]["lr"] == 1e-2 * 0.5**4 and schedule.last_epoch == 4
    assert {int(state["step"]) for state in optimizer.state.values()} == {4}
    # the same update leads to the same place: momentum and second moments are those of then
    trained(backbone, optimizer, 1)
    assert all(torch.equal(p, old) for p, old in zip(backbone.parameters(), wanted[5], strict=True))
    # the second time it goes further back, and the third time it has given up
    assert ring.rewind(training, facts(7, loss=math.inf)) == {"action/rollback_to_step": 2.0}
    assert all(torch.equal(p, old) for p, old in zip(backbone.parameters(), wanted[2], strict=True))
    assert not ring.can_roll_back and ring.rewind(training, facts(8, loss=math.nan)) == {}


@pytest.mark.parametrize("scheduled", [False, True])
def test_going_back_keeps_the_options_of_the_run(scheduled: bool) -> None:
    # a snapshot from the checkpoint of a run with another weight decay and another rate
    backbone = small_vl_moe()
    optimizer = AdamW(backbone.parameters(), lr=1e-2, weight_decay=0.1)
    schedules = [torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)] if scheduled else []
    training = training_of(backbone, optimizer)._replace(schedulers=schedules)
    ring = SnapshotRing(Rollback())
    ring.start(training, 0)
    optimizer.param_groups[0].update(lr=3e-2, weight_decay=0.5)
    assert ring.rewind(training, facts(1, loss=math.nan)) == {"action/rollback_to_step": 0.0}
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    assert optimizer.param_groups[0]["lr"] == (1e-2 if scheduled else 3e-2)  # a schedule's rate goes back with it


def test_a_snapshot_can_be_gone_back_to_again() -> None:
    # the last one stays in the ring, and training on from it must not change it
    backbone = small_vl_moe()
    optimizer = AdamW(backbone.parameters(), lr=1e-2)
    training = training_of(backbone, optimizer)
    trained(backbone, optimizer, 2)
    ring = SnapshotRing(Rollback(keep=1, lookback=1))
    ring.start(training, 2)
    places = []
    for step in (3, 5):
        trained(backbone, optimizer, 1)
        assert ring.rewind(training, facts(step, loss=math.nan)) == {"action/rollback_to_step": 2.0}
        trained(backbone, optimizer, 1)
        places.append([parameter.detach().clone() for parameter in backbone.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*places, strict=True))


def test_the_window_goes_back_with_the_weights() -> None:
    # window [3, 5] at the snapshot: bound 4 + 1 = 5; [5, 10] when it goes wrong: bound 7.5 + 2.5 = 10
    training = training_of(small_vl_moe())
    ring = SnapshotRing(Rollback(every_n_steps=2, lookback=1, window=2, spike_threshold=1.0))
    ring.start(training, 0)
    for step, loss in ((1, 3.0), (2, 5.0), (3, 10.0)):
        ring.after_step(training, facts(step, loss=loss))
    assert ring.rewind(training, facts(4, loss=9.0)) == {}
    assert ring.rewind(training, facts(4, loss=math.nan)) == {"action/rollback_to_step": 2.0}
    assert ring.rewind(training, facts(5, loss=4.9)) == {}
    assert ring.rewind(training, facts(5, loss=9.0)) == {"action/rollback_to_step": 0.0}


def test_a_snapshot_younger_than_the_lookback_is_not_trusted() -> None:
    backbone = small_vl_moe()
    training = training_of(backbone)
    ring = SnapshotRing(Rollback(every_n_steps=5, keep=3, lookback=3, window=3))
    ring.start(training, 0)
    for step in range(1, 11):
        ring.after_step(training, facts(step))
    assert ring.rewind(training, facts(12, loss=math.nan)) == {"action/rollback_to_step": 5.0}  # 10 is 2 steps old


def test_ring_and_count_go_through_a_checkpoint() -> None:
    backbone = small_vl_moe()
    training = training_of(backbone, AdamW(backbone.parameters()))
    options = Rollback(every_n_steps=1, keep=2, lookback=1, window=2, spike_threshold=1.0, max_rollbacks=2)
    one, two = SnapshotRing(options), SnapshotRing(options)
    one.start(training, 0)
    for step, loss in ((1, 3.0), (2, 5.0), (3, 4.0)):
        one.after_step(training, facts(step, loss=loss))
    two.load_state_dict(one.state_dict())
    two.start(training, 3)  # brings no snapshot of its own
    for ring in (one, two):  # mean 4.5, std 0.5
        assert ring.rewind(training, facts(4, loss=4.9)) == {}
        assert ring.rewind(training, facts(4, loss=5.1)) == {"action/rollback_to_step": 3.0}
        # back with the ring the window is the one of then, and the newest snapshot is gone
        assert ring.rewind(training, facts(5, loss=math.nan)) == {"action/rollback_to_step": 2.0}
        assert ring.rewind(training, facts(6, loss=math.nan)) == {}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: QKClip(0.0), "qk_clip.threshold is 0.0"),
        (lambda: FreezeRouter(-1), "freeze_router.after_steps is -1"),
        (lambda: ReviveDeadExperts(idle_steps=0), "revive_dead_experts.idle_steps is 0"),
        (lambda: ReviveDeadExperts(noise=0.0), "an exact copy would win no token"),
        (lambda: Rollback(keep=0), "rollback.keep is 0: choose 1 or more"),
        (lambda: Rollback(spike_threshold=0.0), "rollback.spike_threshold is 0.0"),
    ],
)
def test_impossible_options_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()
