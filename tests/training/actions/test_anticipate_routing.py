"""Anticipatory routing: choices of older routers, weighed by current ones; on after a spike, off again."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import PairPlan, RoutingInput
from lightning_moevlm.model.layers import MoEFFN, initialise
from lightning_moevlm.model.routers import (
    CosineRouter,
    EarlierChoices,
    ExpertChoiceRouter,
    GroupLimitedRouter,
    NoisyTopKRouter,
    Router,
    SigmoidBiasRouter,
    TopKRouter,
)
from lightning_moevlm.model.routers.choices import list_choices
from lightning_moevlm.training import Actions, VisionLanguageModule
from lightning_moevlm.training.actions import AnticipateRouting, Rollback
from lightning_moevlm.training.actions.anticipate_routing import RoutingAnticipator
from tests.model.layers.test_experts import LAYOUT
from tests.routing import routing_input
from tests.small_model import small_vl_moe
from tests.training.actions.test_actions_fit import assert_equal
from tests.training.by_hand import facts, training_of
from tests.training.small_fit import LossesSeen, Poison, fit, tiny_module

TAKERS: dict[str, Callable[[int, int], Router]] = {
    "top-2": partial(TopKRouter, top_k=2),
    "renormalised": partial(TopKRouter, top_k=2, renormalise=True),
    "sigmoid": SigmoidBiasRouter,
    "groups": GroupLimitedRouter,
    "noisy": NoisyTopKRouter,
    "cosine": partial(CosineRouter, top_k=2),
}


def built(build: Callable[[int, int], Router], seed: int) -> Router:
    router = build(16, 8)
    initialise(router, seed=seed, std=0.5)
    return router.eval()


@pytest.mark.parametrize("name", TAKERS)
def test_choices_come_from_the_earlier_router_and_weights_from_the_current_one(name: str) -> None:
    now, then = built(TAKERS[name], 0), built(TAKERS[name], 1)
    inputs = routing_input(48, 16, num_padding=5)
    free, earlier = now(inputs), then(inputs)
    taken = now(inputs._replace(expert_TK=EarlierChoices(then)(inputs)))
    assert isinstance(taken, PairPlan) and torch.equal(taken.expert_N, earlier.expert_N)
    assert torch.equal(taken.logits_TE, free.logits_TE) and torch.equal(taken.chosen_N, free.chosen_N)
    assert bool((taken.expert_N != free.expert_N).any())
    # a pair that both have weighs as much where weights do not depend on the other choices
    same_N = (taken.expert_N == free.expert_N) & taken.chosen_N
    if name in ("top-2", "groups", "noisy", "cosine"):
        assert torch.equal(taken.weight_N[same_N], free.weight_N[same_N])
    elif name == "renormalised":
        torch.testing.assert_close(taken.weight_N.view(2, 48).sum(0)[inputs.valid_T], torch.ones(43))
    taken.weight_N[taken.chosen_N].square().sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in now.parameters())
    assert all(p.grad is None for p in then.parameters())


@pytest.mark.parametrize("name", TAKERS)
def test_its_own_choices_change_nothing_to_the_bit(name: str) -> None:
    router, inputs = built(TAKERS[name], 0), routing_input(48, 16, num_padding=5)

    def run(inputs: RoutingInput) -> list[Tensor]:
        router.zero_grad(set_to_none=True)
        plan = router(inputs)
        (plan.weight_N * plan.chosen_N).square().sum().backward()
        return [plan.expert_N, plan.weight_N.detach(), *(p.grad for p in router.parameters() if p.grad is not None)]

    own = inputs._replace(expert_TK=EarlierChoices(router)(inputs))
    assert all(map(torch.equal, run(inputs), run(own)))


def test_choices_are_listed_by_token() -> None:
    # choice-major: first choices of three tokens, then second ones
    plan = built(TAKERS["top-2"], 0)(routing_input(3, 16))
    assert list_choices(plan).tolist() == plan.expert_N.view(2, 3).t().tolist()


def test_a_layer_takes_choices_while_training_alone_and_under_compile() -> None:
    layer = MoEFFN(16, 4, partial(TopKRouter, top_k=2))
    initialise(layer, seed=0, std=0.5)
    other = TopKRouter(16, 4, top_k=2)
    initialise(other, seed=9, std=0.5)
    tokens = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    layer.choose = EarlierChoices(other)
    training, evaluating = layer.train()(tokens, LAYOUT), layer.eval()(tokens, LAYOUT)
    layer.choose = None
    plain = layer(tokens, LAYOUT)
    assert torch.equal(evaluating.tokens_BSD, plain.tokens_BSD)
    assert not torch.equal(training.plans[0].plan.expert_N, plain.plans[0].plan.expert_N)
    assert not any("choose" in name for name in layer.state_dict())
    layer.choose = EarlierChoices(other)
    compiled = torch.compile(layer.train(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, LAYOUT).tokens_BSD, training.tokens_BSD)


def steps_of(
    action: RoutingAnticipator, backbone: torch.nn.Module, losses: list[float]
) -> list[tuple[bool, int, dict]]:
    """On, the step of the routers that choose, and events, for each step."""
    seen = []
    for step, loss in enumerate(losses, start=1):
        action.prepare(step - 1)
        on, chosen_by = action.is_on, action.chosen_by
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter += 1e-3
        events = action.after_step(training_of(backbone), facts(step, loss=loss))  # type: ignore[arg-type]
        assert chosen_by is not None
        seen.append((on, chosen_by, events))
    return seen


def test_on_after_a_spike_for_some_steps_by_routers_of_some_steps_ago_by_hand() -> None:
    # window 3, threshold 5: losses 1, 2, 3 have mean 2, std 0.82; 9 is a spike (above 6.1) and stays out of the window
    # step t is computed with the weights after t - 1 steps; 2 before are those after t - 3
    backbone = small_vl_moe()
    options = AnticipateRouting(delay=2, num_steps=2, spike_threshold=5.0, window=3)
    action = RoutingAnticipator(options, backbone)
    seen = steps_of(action, backbone, [1.0, 2.0, 3.0, 9.0, 2.0, 2.0, 2.0])
    assert [on for on, _, _ in seen] == [False, False, False, False, True, True, False]
    assert [by for _, by, _ in seen] == [0, 0, 0, 1, 2, 3, 4]
    key = "action/anticipated_routing"
    assert [events.get(key) for _, _, events in seen] == [None, None, None, 1.0, None, 0.0, None]


def test_a_loss_that_is_not_finite_and_a_rollback_switch_on() -> None:
    backbone = small_vl_moe()
    action = RoutingAnticipator(AnticipateRouting(delay=1, num_steps=3, spike_threshold=None), backbone)
    assert [on for on, _, _ in steps_of(action, backbone, [1.0, float("nan"), 99.0, 1.0, 1.0, 1.0])] == [
        False, False, True, True, True, False,
    ]  # fmt: skip
    assert action.after_rollback() == {"action/anticipated_routing": 1.0} and action.is_on


def anticipating(num_steps: int | None = None, **options: object) -> Actions:
    return Actions(anticipate_routing=AnticipateRouting(delay=2, num_steps=num_steps), **options)  # type: ignore[arg-type]


def test_a_run_is_another_one_and_resumes_to_the_bit(tmp_path: Path) -> None:
    def run(actions: Actions, steps: int, **options: Path) -> LossesSeen:
        seen = LossesSeen()
        fit(tiny_module(actions, lr=3e-2), steps, callbacks=[seen], **options)
        return seen

    plain, whole = run(Actions(), 8), run(anticipating(), 8, save_to=tmp_path / "whole.ckpt")
    assert plain.losses[:1] == whole.losses[:1] and plain.losses != whole.losses
    run(anticipating(), 4, save_to=tmp_path / "half.ckpt")
    rest = run(anticipating(), 8, resume_from=tmp_path / "half.ckpt", save_to=tmp_path / "resumed.ckpt")
    assert rest.losses == whole.losses[4:]
    one, two = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("whole", "resumed"))
    assert_equal(one["state_dict"], two["state_dict"], "state_dict")
    assert_equal(one["callbacks"], two["callbacks"], "callbacks")


def test_a_rollback_switches_on_and_the_routers_of_its_snapshot_choose() -> None:
    module = tiny_module(anticipating(3, rollback=Rollback(every_n_steps=2, lookback=1)))
    points = fit(module, 12, callbacks=[Poison(at_step=6)]).points
    assert points["action/rollback_to_step"] == [(6, 4.0)]
    assert points["action/anticipated_routing"] == [(6, 1.0), (9, 0.0)]
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AnticipateRouting(delay=0), r"anticipate_routing\.delay is 0"),
        (lambda: AnticipateRouting(num_steps=0), r"anticipate_routing\.num_steps is 0"),
        (
            lambda: VisionLanguageModule(small_vl_moe(router=ExpertChoiceRouter), actions=anticipating()),
            "cannot act with ExpertChoiceRouter",
        ),
        (
            lambda: VisionLanguageModule(small_vl_moe(sparse_modalities=()), actions=anticipating()),
            "cannot act on this model, which trains no router",
        ),
        (
            lambda: VisionLanguageModule(small_vl_moe(), actions=anticipating(), trainable=("backbone.text",)),
            "cannot act on this model, which trains no router",
        ),
    ],
)
def test_what_cannot_act_is_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()


def test_in_plain_bf16_too() -> None:
    backbone = small_vl_moe(top_k=2).bfloat16()
    module = VisionLanguageModule(backbone, optimizer=partial(AdamW, lr=1e-2), actions=anticipating())
    assert len(fit(module, 4, precision="bf16-true").outputs) == 4
