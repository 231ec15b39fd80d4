"""The contract that every router keeps, with capacity and every dispatcher behind it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_moevlm.contracts.routing_plan import Modality, PairPlan, RoutingInput
from lightning_moevlm.model.dispatch import (
    AutoDispatcher,
    Capacity,
    Dispatcher,
    GroupedDispatcher,
    LoopDispatcher,
    ModalityFactors,
    PaddedDispatcher,
    SegmentDispatcher,
    apply_capacity,
)
from lightning_moevlm.model.dispatch.capacity import Priority
from lightning_moevlm.model.experts import MLPExperts
from lightning_moevlm.model.layers import initialise
from lightning_moevlm.model.losses import LoadBalance, RouterZ
from lightning_moevlm.model.metrics import routing_metrics
from lightning_moevlm.model.routers import (
    SMEBU,
    CosineRouter,
    ExpertChoiceRouter,
    FixedRouter,
    Gate,
    GroupLimit,
    GroupLimitedRouter,
    GShardRouter,
    HashRouter,
    LongTailRouter,
    ModalityRouter,
    NoisyTopKRouter,
    QuantileUpdate,
    ReLURouter,
    Router,
    SequenceTopKRouter,
    SigmoidBiasRouter,
    SinkhornRouter,
    TopKRouter,
    TopPRouter,
)
from tests.routing import loss_of, routing_input

ROUTERS: dict[str, Callable[[], Router]] = {
    "top-1": lambda: TopKRouter(16, 8, top_k=1),
    "top-2": lambda: TopKRouter(16, 8, top_k=2),
    "top-2 renormalised": lambda: TopKRouter(16, 8, top_k=2, renormalise=True),
    "top-1 with every switch": lambda: TopKRouter(16, 8, gate=Gate(0.01, 0.1, 2.0)),
    "noisy": lambda: NoisyTopKRouter(16, 8),
    "noisy, learned": lambda: NoisyTopKRouter(16, 8, learned_noise=True),
    "noisy, as Shazeer": lambda: NoisyTopKRouter(16, 8, learned_noise=True, renormalise=True),
    "GShard": lambda: GShardRouter(16, 8),
    "sigmoid with bias": lambda: SigmoidBiasRouter(16, 8),
    "sigmoid with bias per modality": lambda: SigmoidBiasRouter(16, 8, per_modality=True),
    "sigmoid with bias, in groups": lambda: SigmoidBiasRouter(16, 8, top_k=3, groups=GroupLimit(4, 2)),
    "sigmoid with bias, top-1": lambda: SigmoidBiasRouter(16, 8, top_k=1),
    "sigmoid with bias by SMEBU": lambda: SigmoidBiasRouter(16, 8, update=SMEBU()),
    "sqrt-softplus, weighed by softmax": lambda: SigmoidBiasRouter(
        16, 8, score="sqrt_softplus", weight_score="softmax"
    ),
    "sigmoid with bias by quantiles": lambda: SigmoidBiasRouter(16, 8, update=QuantileUpdate(num_bins=50)),
    "group-limited": lambda: GroupLimitedRouter(16, 8, top_k=3, groups=GroupLimit(4, 2)),
    "top-p": lambda: TopPRouter(16, 8),
    "sequence top-2": lambda: SequenceTopKRouter(16, 8, max_k=3, renormalise=True),
    "long tail": lambda: LongTailRouter(16, 8),
    "cosine": lambda: CosineRouter(16, 8),
    "cosine at one temperature": lambda: CosineRouter(16, 8, learn_temperature=False),
    "Sinkhorn": lambda: SinkhornRouter(16, 8),
    "Sinkhorn top-2": lambda: SinkhornRouter(16, 8, top_k=2),
    "expert choice": lambda: ExpertChoiceRouter(16, 8, capacity_factor=1.5),
    "expert choice by sigmoid": lambda: ExpertChoiceRouter(16, 8, score="sigmoid"),
    "ReLU": lambda: ReLURouter(16, 8),
    "random": lambda: FixedRouter(16, 8, "random"),
    "balanced": lambda: FixedRouter(16, 8, "balanced", top_k=2),
    "random top-2": lambda: FixedRouter(16, 8, "random", top_k=2),
    "by modality": lambda: ModalityRouter(16, 8),
    "hash": lambda: HashRouter(16, 8),
    "hash top-2": lambda: HashRouter(16, 8, top_k=2),
}
LEARNED = [name for name in ROUTERS if name.split()[0] not in ("random", "balanced", "by", "hash")]
EVERY_CHOICE_TAKEN_UP = [
    name
    for name in ROUTERS
    if name not in ("GShard", "top-p", "ReLU", "expert choice", "long tail") and not name.startswith("sequence")
]


def build(name: str) -> Router:
    router = ROUTERS[name]()
    initialise(router, seed=0, std=0.5)
    return router


@pytest.fixture(params=ROUTERS)
def router(request: pytest.FixtureRequest) -> Router:
    return build(request.param)


def test_noise_is_declared(router: Router) -> None:
    plan = router.train()(routing_input(8, 16))
    assert router.adds_noise == (plan.noisy_logits_TE is not None) and not router.mixes
    assert not NoisyTopKRouter(16, 8, noise_scale=0.0).adds_noise


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plan_is_well_formed(router: Router, training: bool, dtype: torch.dtype) -> None:
    router.train(training)
    inputs = routing_input(40, 16, num_padding=7)
    plan = router(inputs._replace(tokens_TD=inputs.tokens_TD.to(dtype)))
    num_pairs = plan.token_N.shape[0]
    assert plan.expert_N.shape == plan.weight_N.shape == plan.kept_N.shape == plan.chosen_N.shape == (num_pairs,)
    assert plan.expert_N.dtype == plan.token_N.dtype == torch.int64
    assert plan.kept_N.dtype == plan.chosen_N.dtype == torch.bool
    assert plan.logits_TE.dtype == plan.probs_TE.dtype == plan.weight_N.dtype == torch.float32
    assert plan.logits_TE.shape == (40, 8)
    assert int(plan.expert_N.min()) >= 0 and int(plan.expert_N.max()) < 8
    assert int(plan.token_N.min()) >= 0 and int(plan.token_N.max()) < 40
    assert bool(plan.weight_N.isfinite().all())
    assert bool((plan.weight_N >= 0).all())
    sums_T = plan.probs_TE.sum(dim=-1)
    torch.testing.assert_close(sums_T[sums_T > 0], torch.ones_like(sums_T[sums_T > 0]))  # ReLU may choose no expert
    pairs = torch.stack([plan.token_N, plan.expert_N])[:, plan.chosen_N]
    assert pairs.unique(dim=1).shape == pairs.shape, "a token chose an expert twice"


@pytest.mark.parametrize("training", [True, False])
def test_plan_is_fp32_under_autocast(router: Router, training: bool) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = router.train(training)(routing_input(40, 16, num_padding=7))
    assert plan.logits_TE.dtype == plan.probs_TE.dtype == plan.weight_N.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_plan_does_not_depend_on_the_default_dtype(router: Router, training: bool) -> None:
    # bf16-true sets torch's default dtype to bf16 inside forward: a tensor made without a dtype, or a ratio of two
    # integers, would lose what is above 256
    router.train(training)
    inputs = routing_input(600, 16, num_padding=7)
    plans = []
    for default in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        torch.set_default_dtype(default)
        try:
            plans.append(router(inputs))
        finally:
            torch.set_default_dtype(torch.float32)
    for field, expected, found in zip(plans[0]._fields, *plans, strict=True):
        if isinstance(expected, Tensor):
            assert found.dtype == expected.dtype and torch.equal(found, expected), field
        else:
            assert found == expected, field


@pytest.mark.parametrize("training", [True, False])
def test_padding_is_never_routed(router: Router, training: bool) -> None:
    plan = router.train(training)(routing_input(40, 16, num_padding=7))
    assert not bool(plan.chosen_N[plan.token_N >= 33].any())
    assert torch.equal(plan.kept_N, plan.chosen_N)  # only capacity drops


def test_a_router_whose_evaluation_depends_on_other_samples_says_so(router: Router) -> None:
    router.eval()
    inputs = routing_input(40, 16, num_padding=7)  # four samples of ten tokens
    among_others = given(router(inputs))
    alone = torch.cat(
        [
            given(
                router(
                    RoutingInput(
                        *(
                            tensor[start : start + 10]
                            for tensor in (inputs.tokens_TD, inputs.modality_T, inputs.valid_T)
                        ),
                        1,
                        None if inputs.identity_T is None else inputs.identity_T[start : start + 10],
                    )
                )
            )
            for start in range(0, 40, 10)
        ]
    )
    assert router.crosses_samples is not torch.allclose(among_others, alone, atol=1e-6)


def given(plan: PairPlan) -> Tensor:
    """What each token gets from each expert."""
    weight_TE = torch.zeros(plan.num_tokens, plan.num_experts)
    return weight_TE.index_put_((plan.token_N, plan.expert_N), plan.weight_N * plan.kept_N, accumulate=True)


@pytest.mark.parametrize("name", EVERY_CHOICE_TAKEN_UP)
def test_every_real_token_takes_up_its_choices(name: str) -> None:
    plan = build(name)(routing_input(40, 16, num_padding=7))
    assert bool(plan.chosen_N[plan.token_N < 33].all())


def test_padding_content_changes_nothing(router: Router) -> None:
    router.eval()
    inputs = routing_input(40, 16, num_padding=7)
    other_TD = inputs.tokens_TD.clone()
    other_TD[33:] = -3.0
    plan, other = router(inputs), router(inputs._replace(tokens_TD=other_TD))
    kept_N = plan.kept_N
    assert torch.equal(kept_N, other.kept_N)
    assert torch.equal(plan.expert_N[kept_N], other.expert_N[kept_N])
    assert torch.equal(plan.weight_N[kept_N], other.weight_N[kept_N])


def test_a_tally_counts_no_padding(router: Router) -> None:
    inputs = routing_input(40, 16, num_padding=7)
    other_TD = inputs.tokens_TD.clone()
    other_TD[33:] = -3.0
    plan = router.eval()(inputs)
    tally, other = router.tally(plan), router.tally(router(inputs._replace(tokens_TD=other_TD)))
    assert tally.dtype == torch.int64 and tally.shape == (router.tally_size,) and not tally.requires_grad
    assert torch.equal(tally, other)


@pytest.mark.parametrize("name", LEARNED)
def test_task_gradient_reaches_the_gate(name: str) -> None:
    router = build(name)
    plan = router(routing_input(40, 16))
    (plan.weight_N * plan.kept_N * torch.linspace(0, 1, plan.weight_N.shape[0])).sum().backward()
    gradients = [parameter.grad for parameter in router.parameters()]
    assert gradients and all(gradient is not None and float(gradient.abs().sum()) > 0 for gradient in gradients)


def test_evaluation_is_deterministic(router: Router) -> None:
    router.eval()
    inputs = routing_input(40, 16)
    first, second = router(inputs), router(inputs)
    for name, field in first._asdict().items():
        again = getattr(second, name)
        assert torch.equal(field, again) if isinstance(field, Tensor) else field == again, name


@pytest.mark.parametrize("name", LEARNED)
def test_token_order_does_not_matter(name: str) -> None:
    router = build(name).eval()
    inputs = routing_input(40, 16)
    order_T = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    if name.startswith(("sequence", "long tail")):  # they compare the tokens of a sample, and patches with patches
        order_T = torch.arange(40).view(4, 5, 2)[:, torch.tensor([3, 1, 4, 0, 2])].flatten()
    plan = router(inputs)
    shuffled = router(inputs._replace(tokens_TD=inputs.tokens_TD[order_T]))
    torch.testing.assert_close(shuffled.probs_TE, plan.probs_TE[order_T])
    back_T = order_T.argsort()
    expected = dense_weights(plan)
    torch.testing.assert_close(dense_weights(shuffled)[back_T], expected)


def dense_weights(plan: PairPlan) -> Tensor:
    """Weight of every token at every expert, 0 where it does not go."""
    weights_TE = torch.zeros(plan.num_tokens, plan.num_experts)
    kept = plan.kept_N
    return weights_TE.index_put((plan.token_N[kept], plan.expert_N[kept]), plan.weight_N.detach()[kept])


@pytest.mark.parametrize("name", LEARNED)
def test_state_round_trip(name: str) -> None:
    router = build(name).eval()
    inputs = routing_input(40, 16)
    expected = router(inputs)
    state = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    initialise(router, seed=1, std=0.5)
    assert not torch.equal(router(inputs).logits_TE, expected.logits_TE)
    router.load_state_dict(state)
    assert torch.equal(router(inputs).logits_TE, expected.logits_TE)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("priority", ["position", "gate", "probability"])
def test_nothing_is_read_from_the_device(router: Router, priority: Priority, training: bool) -> None:
    # tensors on "meta" have shapes and no values: reading one, which would wait for a GPU, fails
    inputs = RoutingInput(*(x.to("meta") if isinstance(x, Tensor) else x for x in routing_input(40, 16, num_padding=7)))
    plan = router.train(training).to("meta")(inputs)
    some = apply_capacity(plan, Capacity(1.0, ModalityFactors(1.0, None), priority, group_size=2), training)
    assert some.kept_N.is_meta and some.kept_loads()[0].shape == (8,)
    router.rebalance(some.chosen_loads(some.modality_T, 2), router.tally(some))


@pytest.mark.slow  # compiles, seconds each
@pytest.mark.parametrize(
    "name", ["sequence top-2", "long tail", "sqrt-softplus, weighed by softmax", "sigmoid with bias by SMEBU"]
)
def test_a_router_is_one_graph_and_gives_the_same(name: str) -> None:
    router, inputs = build(name), routing_input(40, 16, num_padding=7)
    plain, compiled = router(inputs), torch.compile(router, backend="aot_eager", fullgraph=True)(inputs)
    assert torch.equal(compiled.chosen_N, plain.chosen_N)
    assert torch.equal(compiled.expert_N[plain.chosen_N], plain.expert_N[plain.chosen_N])
    torch.testing.assert_close(compiled.weight_N[plain.chosen_N], plain.weight_N[plain.chosen_N])


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(router: Router, num_tokens: int) -> None:
    plan = router(routing_input(num_tokens, 16))
    assert plan.num_tokens == num_tokens and plan.num_experts == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "dispatcher",
    [SegmentDispatcher(), GroupedDispatcher(), PaddedDispatcher(), AutoDispatcher()],
    ids=lambda d: type(d).__name__,
)
def test_fast_dispatch_equals_the_loop(
    router: Router, dispatcher: Dispatcher, training: bool, dtype: torch.dtype
) -> None:
    router.train(training)
    experts = MLPExperts(16, 8, 32)
    initialise(experts, seed=1, std=0.3)
    experts.to(dtype)
    inputs = routing_input(40, 16, num_padding=7)
    inputs = inputs._replace(tokens_TD=inputs.tokens_TD.to(dtype))
    results = []
    for each in (LoopDispatcher(), dispatcher):
        router.zero_grad()
        experts.zero_grad()
        torch.manual_seed(0)  # for the noise that the router draws
        plan = router(inputs)
        out_TD = each(plan, inputs.tokens_TD, experts)
        (out_TD * torch.linspace(-1, 1, 16).to(dtype)).sum().backward()
        parameters = {**dict(router.named_parameters()), **dict(experts.named_parameters())}
        gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        assert torch.equal(out_TD[33:], torch.zeros(7, 16, dtype=dtype))
        load_E = plan.kept_loads()[0]
        assert int(load_E.sum()) == int(plan.kept_N.sum()) and bool((load_E == plan.chosen_loads()[0]).all())
        results.append((out_TD.detach(), gradients))
    (slow, slow_gradients), (fast, fast_gradients) = results
    # sums in another order: in bf16 some steps of 2^-8 apart, of the largest term of a sum
    close = {} if dtype == torch.float32 else {"rtol": 0.02}
    assert fast_gradients.keys() == slow_gradients.keys()
    for name, gradient in {"outputs": slow, **slow_gradients}.items():
        other = fast if name == "outputs" else fast_gradients[name]
        tolerance = close | ({"atol": 0.02 * float(gradient.abs().max())} if close else {})
        torch.testing.assert_close(other, gradient, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_losses_and_metrics_read_every_plan(router: Router) -> None:
    plan = router(routing_input(40, 16, num_padding=7))
    assert bool(loss_of(LoadBalance(), plan).isfinite()) and bool(loss_of(RouterZ(), plan).isfinite())
    metrics = routing_metrics([plan], Modality.IMAGE)
    assert all(bool(value.isfinite().all()) for value in metrics)
    assert float(metrics.load_E.sum()) == pytest.approx(1.0) and float(metrics.drop_rate) == 0.0


def test_flops_and_experts_per_token_are_positive(router: Router) -> None:
    assert 0 < router.experts_per_token <= router.num_experts
    assert router.forward_flops_per_token() >= 0


@pytest.mark.parametrize("name", LEARNED)
def test_an_expert_that_takes_over_anothers_place_gets_its_scores(name: str) -> None:
    # what reviving dead experts relies on; every parameter but a shared projection or scale has a place for each expert
    router = build(name).eval()
    inputs = routing_input(40, 16)
    assert {id(tensor) for tensor, _ in router.per_expert()} == {
        id(tensor)
        for own_name, tensor in (*router.named_parameters(), *router.named_buffers())
        if own_name not in ("project_weight", "scale")
    }
    with torch.no_grad():
        for tensor, axis in router.per_expert():
            assert tensor.shape[axis] == 8
            tensor.select(axis, 5).copy_(tensor.select(axis, 2))
    logits_TE = router(inputs).logits_TE
    torch.testing.assert_close(logits_TE[:, 5], logits_TE[:, 2])
    assert not torch.allclose(logits_TE[:, 5], logits_TE[:, 3])


def test_controls_have_nothing_per_expert() -> None:
    assert all(build(name).per_expert() == () for name in ROUTERS if name not in LEARNED)
