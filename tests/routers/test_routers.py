"""The contract that every router keeps, and what is particular to softmax top-k."""

from collections.abc import Callable

import pytest
import torch

from lightning_moevlm.errors import UserError
from lightning_moevlm.layers import initialise
from lightning_moevlm.routers import Router, TopKRouter
from tests.routing import routing_input

ROUTERS: dict[str, Callable[[], Router]] = {
    "top-1": lambda: TopKRouter(16, 8, top_k=1),
    "top-2": lambda: TopKRouter(16, 8, top_k=2),
    "top-2 renormalised": lambda: TopKRouter(16, 8, top_k=2, renormalise=True),
}


@pytest.fixture(params=ROUTERS)
def router(request: pytest.FixtureRequest) -> Router:
    router = ROUTERS[request.param]()
    initialise(router, seed=0, std=0.5)
    return router


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plan_is_well_formed(router: Router, training: bool, dtype: torch.dtype) -> None:
    router.train(training)
    inputs = routing_input(40, 16, num_padding=7)
    plan = router(inputs._replace(tokens_TD=inputs.tokens_TD.to(dtype)))
    num_pairs = plan.token_N.shape[0]
    assert plan.expert_N.shape == plan.weight_N.shape == plan.kept_N.shape == (num_pairs,)
    assert plan.logits_TE.dtype == plan.probs_TE.dtype == plan.weight_N.dtype == torch.float32
    assert plan.logits_TE.shape == (40, 8)
    assert int(plan.expert_N.min()) >= 0 and int(plan.expert_N.max()) < 8
    assert int(plan.token_N.min()) >= 0 and int(plan.token_N.max()) < 40
    assert bool(plan.weight_N.isfinite().all())
    torch.testing.assert_close(plan.probs_TE.sum(dim=-1), torch.ones(40))


def test_padding_is_never_routed(router: Router) -> None:
    plan = router(routing_input(40, 16, num_padding=7))
    assert not bool(plan.kept_N[plan.token_N >= 33].any())
    assert bool(plan.kept_N[plan.token_N < 33].all())


def test_padding_content_changes_nothing(router: Router) -> None:
    inputs = routing_input(40, 16, num_padding=7)
    other_TD = inputs.tokens_TD.clone()
    other_TD[33:] = -3.0
    plan, other = router(inputs), router(inputs._replace(tokens_TD=other_TD))
    kept_N = plan.kept_N
    assert torch.equal(kept_N, other.kept_N)
    assert torch.equal(plan.expert_N[kept_N], other.expert_N[kept_N])
    assert torch.equal(plan.weight_N[kept_N], other.weight_N[kept_N])


def test_task_gradient_reaches_the_gate(router: Router) -> None:
    plan = router(routing_input(40, 16))
    (plan.weight_N * torch.linspace(0, 1, plan.weight_N.shape[0])).sum().backward()
    gradients = [parameter.grad for parameter in router.parameters()]
    assert gradients and all(gradient is not None and float(gradient.abs().sum()) > 0 for gradient in gradients)


def test_evaluation_is_deterministic(router: Router) -> None:
    router.eval()
    inputs = routing_input(40, 16)
    first, second = router(inputs), router(inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_token_order_does_not_matter(router: Router) -> None:
    router.eval()
    inputs = routing_input(40, 16)
    order_T = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    plan = router(inputs)
    shuffled = router(inputs._replace(tokens_TD=inputs.tokens_TD[order_T]))
    torch.testing.assert_close(shuffled.probs_TE, plan.probs_TE[order_T])


def test_state_round_trip(router: Router) -> None:
    inputs = routing_input(40, 16)
    expected = router(inputs)
    state = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    initialise(router, seed=1, std=0.5)
    assert not torch.equal(router(inputs).logits_TE, expected.logits_TE)
    router.load_state_dict(state)
    assert torch.equal(router(inputs).logits_TE, expected.logits_TE)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(router: Router, num_tokens: int) -> None:
    plan = router(routing_input(num_tokens, 16))
    assert plan.num_tokens == num_tokens and plan.num_experts == 8


def test_top_2_by_hand() -> None:
    # W = identity, so logits = tokens. softmax(ln 1, ln 2, ln 5) = (1/8, 2/8, 5/8): experts 2 and 1 with 5/8 and 2/8.
    router = TopKRouter(3, 3, top_k=2)
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(3))
    tokens_TD = torch.tensor([[1.0, 2.0, 5.0]]).log()
    plan = router(routing_input(1, 3)._replace(tokens_TD=tokens_TD))
    assert plan.expert_N.tolist() == [2, 1]
    torch.testing.assert_close(plan.weight_N, torch.tensor([5 / 8, 2 / 8]))
    router.renormalise = True
    renormalised = router(routing_input(1, 3)._replace(tokens_TD=tokens_TD))
    torch.testing.assert_close(renormalised.weight_N, torch.tensor([5 / 7, 2 / 7]))


@pytest.mark.parametrize("top_k", [0, 9])
def test_impossible_top_k_is_refused(top_k: int) -> None:
    with pytest.raises(UserError, match=f"top_k is {top_k} with num_experts 8: choose top_k between 1 and 8"):
        TopKRouter(16, 8, top_k=top_k)


def test_renormalised_top_1_is_refused_because_the_gate_would_get_no_gradient() -> None:
    with pytest.raises(UserError, match="renormalise needs top_k >= 2"):
        TopKRouter(16, 8, top_k=1, renormalise=True)
