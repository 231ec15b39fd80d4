"""Faults that other projects had: each is a test here, and says where it was seen (repository and issue)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_moevlm.contracts.routing_plan import Modality, PairPlan, RoutingInput
from lightning_moevlm.contracts.sequence_layout import Layout, Span
from lightning_moevlm.contracts.step_records import LossReport, Term
from lightning_moevlm.model.dispatch import Dispatcher, GroupedDispatcher, LoopDispatcher, SegmentDispatcher
from lightning_moevlm.model.experts import GatedExperts, MLPExperts
from lightning_moevlm.model.layers import MoEFFN, initialise
from lightning_moevlm.model.losses import (
    OWN_LOSSES,
    AuxiliaryLosses,
    GlobalEntropy,
    GShard,
    Importance,
    Load,
    LoadBalance,
    LocalEntropy,
    LossInput,
    MutualInformation,
    RouterOrthogonality,
    RouterZ,
    SequenceBalance,
)
from lightning_moevlm.model.objectives import Draws
from lightning_moevlm.model.routers import (
    ExpertChoiceRouter,
    Gate,
    NoisyTopKRouter,
    ReLURouter,
    Router,
    SigmoidBiasRouter,
    SinkhornRouter,
    SoftRouter,
    TopKRouter,
)
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.optim import parameter_groups
from tests.model.losses.every_loss import LOSSES, raw_loss
from tests.model.routers.test_routers import LEARNED, ROUTERS
from tests.routing import NOTHING, full_plan, loss_of, routing_input
from tests.small_model import pair_batch, small_vl_moe
from tests.training.small_fit import NoTask, build, fit, routers

DISPATCHERS: tuple[Dispatcher, ...] = (LoopDispatcher(), SegmentDispatcher(), GroupedDispatcher())
EVERYTHING = AuxiliaryLosses(
    importance=Importance(),
    load=Load(),
    gshard=GShard(),
    sequence_balance=SequenceBalance(),
    local_entropy=LocalEntropy(),
    global_entropy=GlobalEntropy(),
    mutual_information=MutualInformation(),
    router_orthogonality=RouterOrthogonality(),
)


def learned(name: str) -> Router:
    router = ROUTERS[name]()
    initialise(router, seed=0, std=0.5)
    return router


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize(
    "loss",
    [LoadBalance(), LoadBalance(scope="sequence"), SequenceBalance(), Importance(), GShard(), MutualInformation()],
)
def test_the_balance_gradient_reaches_the_router(name: str, loss: Any) -> None:
    """NeMo Automodel 1408, FuseMoE 6 (computed and dropped), hyper-parallel 752 (constant by broadcasting)."""
    router = learned(name)
    loss(LossInput(router(routing_input(40, 16)))).backward()
    rows = router.rows()
    assert rows is not None and rows.grad is not None
    if name.startswith("expert choice") and loss == LoadBalance():
        # loads are even whatever the scores are: the loss is the constant 1, and `Liveness` ends a run that has it
        assert float(rows.grad.abs().sum()) < 1e-5
    else:
        assert float(rows.grad.abs().sum()) > 1e-2  # rounding alone, as of a constant, makes some 1e-7


def test_softmax_is_applied_once() -> None:
    """transformers 45120: a second softmax over probabilities left the loss of Mixtral and Qwen-MoE almost inert."""
    # a router sure of one expert for all: f = P = (1, 0, 0, 0), so 4; of probabilities taken for logits, P would be
    # e / (e + 3) and the loss 1.9
    router = TopKRouter(4, 4)
    with torch.no_grad():
        router.weight_ED.copy_(torch.tensor([40.0, 0, 0, 0]).unsqueeze(-1).expand(4, 4))
    plan = router(RoutingInput(torch.ones(6, 4), torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.bool)))
    assert float(loss_of(LoadBalance(), plan)) == pytest.approx(4.0)


def test_every_coefficient_counts() -> None:
    """transformers 44242 and 44243: a coefficient did nothing unless router logits were returned."""
    inputs = [LossInput(full_plan(torch.randn(8, 4, generator=torch.Generator().manual_seed(0))), torch.randn(4, 3))]
    names = list(OWN_LOSSES)
    terms = EVERYTHING.terms(inputs, weights={name: 2.0**place for place, name in enumerate(names)})
    assert len(terms) == 10
    for name, term in terms.items():
        torch.testing.assert_close(term.weighted, term.raw * 2.0 ** names.index(name))


@pytest.mark.parametrize("name", ["top-1", "noisy", "sigmoid with bias"])
def test_jitter_and_z_loss_are_not_dropped(name: str) -> None:
    """DeepSpeed AutoEP takes both options and only warns that it drops them."""
    router = learned(name)
    plain = router(routing_input(40, 16))
    router.gate = Gate(jitter=0.1)
    torch.manual_seed(0)
    jittered = router.train()(routing_input(40, 16))
    assert not torch.equal(plain.logits_TE, jittered.logits_TE)
    term = AuxiliaryLosses(None, RouterZ(0.5)).terms([LossInput(jittered)])["router_z"]
    assert float(term.weighted) == pytest.approx(0.5 * float(loss_of(RouterZ(), jittered)))
    assert float(term.weighted) > 0


def test_no_coefficient_multiplies_another() -> None:
    """KempnerForge (by reading): the weight of the sequence loss was multiplied by the general one again."""
    inputs = [LossInput(full_plan(torch.randn(8, 4, generator=torch.Generator().manual_seed(0))))]
    sequence = SequenceBalance(0.5)
    beside = AuxiliaryLosses(LoadBalance(0.1), sequence_balance=sequence).terms(inputs)["sequence_balance"]
    alone = AuxiliaryLosses(None, None, sequence_balance=sequence).terms(inputs)["sequence_balance"]
    assert float(beside.weighted) == float(alone.weighted) == pytest.approx(0.5 * float(alone.raw))


def test_the_scale_does_not_move_with_accumulation() -> None:
    """Megatron-LM 3672 and 3769, NeMo Automodel 3359; the number of ranks: tests/training/test_balance_ranks.py."""
    batch = pair_batch()
    losses = AuxiliaryLosses(
        LoadBalance(0.5),
        RouterZ(0.1),
        importance=Importance(0.5),
        gshard=GShard(0.5),
        sequence_balance=SequenceBalance(0.5),
        local_entropy=LocalEntropy(0.5),
        global_entropy=GlobalEntropy(0.5),
        mutual_information=MutualInformation(0.5),
        router_orthogonality=RouterOrthogonality(0.5),
    )

    def trained(accumulate: int) -> dict[str, Tensor]:
        module = build(losses, lr=1.0, objective=NoTask)
        fit(module, 1, batches=[batch] * 4, accumulate=accumulate)
        return routers(module)

    once, four_times = trained(1), trained(4)
    for name, value in once.items():
        torch.testing.assert_close(value, four_times[name])


def test_layers_are_averaged_and_not_concatenated() -> None:
    """transformers 28255, 29503 and 31464, OLMoE 45: two layers, each uneven its own way, passed for balanced."""
    uneven, other_way = (full_plan(torch.tensor([row]).repeat(4, 1)) for row in ([5.0, -5.0], [-5.0, 5.0]))
    term = AuxiliaryLosses().terms([LossInput(uneven), LossInput(other_way)])["load_balance"]
    assert float(term.raw) == pytest.approx(2.0, rel=1e-3)  # concatenated: 1


def test_probability_is_counted_over_all_experts() -> None:
    """aprender 2162: with the mass over the chosen k alone an even router of two experts scored 0.5 instead of 1."""
    assert float(loss_of(LoadBalance(), full_plan(torch.zeros(6, 2)))) == pytest.approx(1.0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("logits_TE", [torch.zeros(8, 4), torch.eye(4).repeat(2, 1)], ids=["zero", "even"])
def test_no_nan_gradient_where_all_is_even(name: str, logits_TE: Tensor) -> None:
    """vmoe pull request 218: the root in a coefficient of variation has no gradient at 0."""
    logits_TE = logits_TE.clone().requires_grad_()
    raw_loss(name, logits_TE, noise=0.0).backward()
    assert bool(logits_TE.grad.isfinite().all())


def test_nothing_is_counted_in_forward() -> None:
    """NeMo Automodel 2635, 3156 and 3247, transformers 47467; torchtitan halves its counters instead.

    Recomputation runs `forward` twice; that it routes and trains alike is in tests/training/test_balancing.py.
    """
    for name, make in ROUTERS.items():
        router = make()
        initialise(router, seed=0, std=0.5)
        before = {key: value.clone() for key, value in router.state_dict().items()}
        for _ in range(2):
            router(routing_input(40, 16))
        after = router.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before), name


def test_the_balancing_bias_is_no_parameter_and_no_part_of_the_weights() -> None:
    """KempnerForge (by reading): a trainable bias inside the sigmoid. Here no optimiser ever sees it."""
    router = learned("sigmoid with bias")
    assert isinstance(router, SigmoidBiasRouter)
    backbone = build(AuxiliaryLosses(), SigmoidBiasRouter).backbone
    grouped = {
        id(parameter) for group in parameter_groups(backbone.named_parameters()) for parameter in group["params"]
    }
    biases = [buffer for name, buffer in backbone.named_buffers() if name.endswith("bias_AE")]
    assert biases and not any(id(bias) in grouped or bias.requires_grad for bias in biases)
    inputs = routing_input(40, 16)
    plain = router(inputs)
    router.bias_AE += 5.0  # the same for all: another mean, the same choices
    moved = router(inputs)
    assert torch.equal(plain.expert_N, moved.expert_N) and torch.equal(plain.weight_N, moved.weight_N)


def test_the_balancing_bias_does_not_drift_in_mean() -> None:
    """torchtitan 1506: sign updates of uneven loads do not sum to 0."""
    router = SigmoidBiasRouter(16, 8)
    for step in range(50):
        load_AE = torch.zeros(2, 8, dtype=torch.int64)
        load_AE[0, step % 8] = 100  # one expert above the mean, seven below
        router.rebalance(load_AE, NOTHING)
    assert float(router.bias_AE.mean().abs()) < 1e-6
    assert float(router.bias_AE.abs().max()) > 1e-4


def test_losses_of_a_sigmoid_gate_see_a_distribution() -> None:
    """Megatron-LM 1545, OLMo-core pull request 255: sigmoid scores went into a loss written for a softmax."""
    plan = learned("sigmoid with bias")(routing_input(40, 16))
    torch.testing.assert_close(plan.probs_TE.sum(dim=-1), torch.ones(40))
    even = plan._replace(probs_TE=torch.full_like(plan.probs_TE, 1 / 8))
    assert float(loss_of(LoadBalance(), even)) == pytest.approx(1.0)  # raw scores of 1/2 would give 4
    expected = plan.logits_TE.exp().sum(dim=-1).log().square().mean()  # of logits, whatever the gate makes of them
    torch.testing.assert_close(loss_of(RouterZ(), plan), expected)


def test_the_reported_loss_is_the_task_alone() -> None:
    """open_lm pull request 255: auxiliary losses were inside the reported loss."""
    report = LossReport({"text": Term(torch.tensor(2.0), 0.5)}, {"load_balance": Term(torch.tensor(3.0), 1.0)})
    assert float(report.task_loss) == 1.0 and float(report.total_loss) == 4.0


def test_experts_and_routers_start_apart() -> None:
    """LibMoE (by reading): all gates and experts had the same seed, so nothing told them apart."""
    module = VisionLanguageModule(small_vl_moe())
    stacks = [layer for layer in module.backbone.modules() if isinstance(layer, MoEFFN)]
    assert len(stacks) >= 2
    for layer in stacks:
        for stack in layer.experts.parameters():
            for one in range(1, stack.shape[0]):
                assert not torch.equal(stack[0], stack[one])
    first, second = (layer.router.rows() for layer in stacks[:2])
    assert first is not None and second is not None and not torch.equal(first, second)


@pytest.mark.parametrize("name", [*ROUTERS, "soft"])
def test_a_router_in_which_tokens_compete_says_so(name: str) -> None:
    """KempnerForge (MoMa), MoSA 3: expert choice looks at later tokens, which a causal model must not."""
    router = ROUTERS[name]() if name != "soft" else SoftRouter(16, 8)
    initialise(router, seed=0, std=0.5)
    inputs = routing_input(40, 16)._replace(num_sequences=1)
    changed_TD = inputs.tokens_TD.clone()
    changed_TD[20:] = 3 * torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    others_T = torch.arange(40) < 20

    def routing(tokens_TD: Tensor) -> Tensor:
        """What each of the first 20 tokens gets from each expert."""
        torch.manual_seed(0)  # the same noise for the same places
        plan = router(inputs._replace(tokens_TD=tokens_TD))
        if not isinstance(plan, PairPlan):
            return plan.dispatch_BEZS[..., :20]
        weight_TE = torch.zeros(40, 8)
        weight_TE.index_put_((plan.token_N, plan.expert_N), plan.weight_N * plan.chosen_N, accumulate=True)
        return weight_TE[others_T]

    leaks = not torch.allclose(routing(inputs.tokens_TD), routing(changed_TD), atol=1e-6)
    assert leaks <= router.competes
    if isinstance(router, (ExpertChoiceRouter, SinkhornRouter, SoftRouter)):
        assert leaks  # so that this test could see it


@pytest.mark.parametrize("experts", [MLPExperts, GatedExperts])
def test_bf16_grouped_products_train_as_fp32_does(experts: Callable[..., Any]) -> None:
    """ReMoE 11: with ReLU routing the bf16 grouped GEMM did not converge where fp32 did."""
    router = learned("ReLU")
    assert isinstance(router, ReLURouter)
    stack = experts(16, 8, hidden_dim=24)
    initialise(stack, seed=1, std=0.3)
    tokens_TD = routing_input(40, 16).tokens_TD

    def gradients(dispatcher: Dispatcher, dtype: torch.dtype) -> list[Tensor]:
        router.zero_grad()
        stack.zero_grad()
        inputs_TD = tokens_TD.detach().clone().requires_grad_()
        plan = router(routing_input(40, 16)._replace(tokens_TD=inputs_TD))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            output_TD = dispatcher(plan, inputs_TD, stack)
        output_TD.float().square().sum().backward()
        grads = [parameter.grad for parameter in (*stack.parameters(), *router.parameters(), inputs_TD)]
        return [grad.clone() for grad in grads if grad is not None]

    exact = gradients(LoopDispatcher(), torch.float32)
    assert len(exact) == len([*stack.parameters(), *router.parameters()]) + 1
    for dispatcher in DISPATCHERS:
        for rounded, reference in zip(gradients(dispatcher, torch.bfloat16), exact, strict=True):
            # bf16 keeps 8 bits: 0.4 % per number, a few of them in a row
            assert float((rounded - reference).norm() / reference.norm()) < 0.03, type(dispatcher).__name__


@pytest.mark.parametrize("dispatcher", DISPATCHERS, ids=lambda dispatcher: type(dispatcher).__name__)
def test_a_batch_of_one_with_empty_experts_has_no_nan(dispatcher: Dispatcher) -> None:
    """SM3Det 22: small batches left experts empty and gave NaN."""
    backbone = small_vl_moe(num_experts=32, dispatcher=dispatcher)
    for layer in backbone.modules():
        if isinstance(layer, MoEFFN):
            layer.router = NoisyTopKRouter(32, 32)
    module = VisionLanguageModule(backbone, losses=EVERYTHING, init_std=0.3)
    output = module.objective(module.backbone, pair_batch(1), Draws(0))
    inputs = [LossInput(named.plan, module.backbone.get_submodule(named.layer).router.rows()) for named in output.plans]
    assert any(bool((named.plan.chosen_loads()[0] == 0).any()) for named in output.plans)
    report = LossReport(output.terms, EVERYTHING.terms(inputs, output.log_partitions))
    report.total_loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name
    assert bool(report.total_loss.isfinite())


class OneLayer(nn.Module):
    """A mixture of experts over sequences of 6 patches; its output and the balance loss of its plan."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = MoEFFN(16, 4, router=TopKRouter, dispatcher=SegmentDispatcher())

    def forward(self, tokens_BSD: Tensor) -> Tensor:
        layout = Layout((Span(Modality.IMAGE, 0, 6),), torch.ones(tokens_BSD.shape[:2], dtype=torch.bool))
        output = self.ffn(tokens_BSD, layout)
        plan = output.plans[0].plan
        total: Tensor = output.tokens_BSD.square().sum() + loss_of(LoadBalance(), plan)
        return total


@pytest.mark.slow
def test_compiled_and_data_parallel(tmp_path: Path) -> None:
    """pytorch 196227: torch.compile and DistributedDataParallel together crashed on a mixture of experts."""

    def compiled(module: nn.Module) -> nn.Module:
        return torch.compile(module, backend="aot_eager")  # type: ignore[return-value]

    def gradients(wrap: Callable[[nn.Module], nn.Module]) -> list[Tensor]:
        layer = OneLayer()
        initialise(layer, 0, 0.3)
        wrapped = wrap(layer)
        for seed in range(2):  # the second time with gradients to add to
            wrapped(torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(seed))).backward()
        return [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]

    plain = gradients(lambda module: module)
    assert len(plain) == len(list(OneLayer().parameters()))
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        orders = (
            lambda module: DistributedDataParallel(compiled(module)),
            lambda module: compiled(DistributedDataParallel(module)),
        )
        for order in orders:
            for one, other in zip(gradients(order), plain, strict=True):
                torch.testing.assert_close(one, other)
    finally:
        torch.distributed.destroy_process_group()
