"""`torch.compile` takes a whole model into one graph with every dispatcher, and gives the results of eager mode."""

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from lightning_moevlm.contracts.routing_plan import PairPlan
from lightning_moevlm.model.dispatch import (
    AutoDispatcher,
    Capacity,
    Dispatcher,
    GroupedDispatcher,
    LoopDispatcher,
    PaddedDispatcher,
    SegmentDispatcher,
    apply_capacity,
)
from lightning_moevlm.model.dispatch.capacity import ModalityFactors
from lightning_moevlm.model.experts import MLPExperts
from lightning_moevlm.model.layers import initialise
from lightning_moevlm.model.routers import TopKRouter
from tests.routing import routing_input
from tests.small_model import pair_batch, small_vl_moe

DISPATCHERS: dict[str, Callable[[], Dispatcher]] = {
    "auto": AutoDispatcher,
    "segments": SegmentDispatcher,
    "grouped": GroupedDispatcher,
    "padded": PaddedDispatcher,
    "padded, fixed": lambda: PaddedDispatcher(4.0),
    "loop": LoopDispatcher,
}
CAPACITIES = {
    "dropless": None,
    "capacity": Capacity(1.0, 1.0),
    "by modality": Capacity(ModalityFactors(1.0, None), None, "gate", group_size=1),
}

# A fixed number of places is refused where a capacity leaves the load of an expert open.
COMBINATIONS = sorted({*product(DISPATCHERS, CAPACITIES)} - {("padded, fixed", "by modality")})


@pytest.fixture(autouse=True)
def forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def passes(run: nn.Module, module: nn.Module, num_samples: int) -> list[Tensor]:
    """Return the features of a batch and the gradients of all parameters."""
    batch = pair_batch(num_samples)
    module.zero_grad(set_to_none=True)
    output = run(batch.images_BRYX, batch.text_BL, batch.text_mask_BL)
    output.tokens_BSD.square().sum().backward()
    return [output.tokens_BSD.detach(), *(each.grad for each in module.parameters() if each.grad is not None)]


def assert_the_same(dispatcher: Dispatcher, capacity: Capacity | None, training: bool, backend: str) -> None:
    model = small_vl_moe(top_k=2, num_blocks=2, num_vl_blocks=0, capacity=capacity, dispatcher=dispatcher)
    run = torch.compile(model.train(training), backend=backend, fullgraph=True)  # a break would raise
    for num_samples in (4, 6):  # the second size makes the compiler see sizes as variables
        plain, compiled = passes(model, model, num_samples), passes(run, model, num_samples)
        for one, other in zip(plain, compiled, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-3 * float(one.abs().max()))


@pytest.mark.parametrize(
    "name",
    # `auto` runs segments or the loop here, and `padded, fixed` is `padded` with one number given
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ("segments", "padded", "loop") else name
        for name in DISPATCHERS
    ],
)
def test_a_layer_is_one_graph_and_gives_the_same(name: str) -> None:
    results = []
    for compiled in (False, True):
        layer = _Layer(DISPATCHERS[name]())
        run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer  # a break would raise
        out_TD = run(layer.inputs.tokens_TD)
        out_TD.square().sum().backward()
        results.append([out_TD.detach(), *(parameter.grad for parameter in layer.parameters())])
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(again, plain)


def test_a_model_with_a_capacity_is_one_graph() -> None:
    model, batch = small_vl_moe(num_blocks=2, num_vl_blocks=0, capacity=Capacity(1.0, 1.0)), pair_batch()
    run = torch.compile(model, backend="eager", fullgraph=True)
    inputs = (batch.images_BRYX, batch.text_BL, batch.text_mask_BL)
    torch.testing.assert_close(run(*inputs).tokens_BSD, model(*inputs).tokens_BSD)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "limit"), COMBINATIONS)
def test_the_default_back_end_gives_the_same(name: str, limit: str, training: bool) -> None:
    assert_the_same(DISPATCHERS[name](), CAPACITIES[limit], training, "inductor")


@pytest.mark.slow  # compiles C++, half a minute each
@pytest.mark.parametrize("limit", ["capacity", "by modality"])
def test_the_default_back_end_counts_what_an_expert_may_take(limit: str) -> None:
    """Adding floating-point numbers into one element by index fails there on CPUs; a batch is one pool of places."""
    capacity = CAPACITIES[limit]
    assert capacity is not None
    router = TopKRouter(16, 4, 2)
    initialise(router, seed=3, std=0.3)
    plan = router(routing_input(48, 16, num_padding=5))
    assert isinstance(plan, PairPlan)

    def kept(plan: PairPlan) -> tuple[Tensor, Tensor | None]:
        limited = apply_capacity(plan, capacity, training=True)
        return limited.kept_N, limited.capacity_T

    plan = plan._replace(weight_N=plan.weight_N.detach())
    for one, other in zip(kept(plan), torch.compile(kept, fullgraph=True)(plan), strict=True):
        assert torch.equal(one, other)


def test_with_autocast_to_bf16_fixed_shapes_are_one_graph() -> None:
    for dispatcher in (PaddedDispatcher(4.0), GroupedDispatcher()):
        layer = _Layer(dispatcher)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out_TD = torch.compile(layer, backend="aot_eager", fullgraph=True)(layer.inputs.tokens_TD)
            torch.testing.assert_close(out_TD, layer(layer.inputs.tokens_TD), atol=2e-2, rtol=2e-2)
        torch._dynamo.reset()


class _Layer(nn.Module):
    def __init__(self, dispatcher: Dispatcher) -> None:
        super().__init__()
        self.router, self.experts, self.dispatcher = TopKRouter(16, 4, 2), MLPExperts(16, 4, 32), dispatcher
        self.inputs = routing_input(32, 16)
        initialise(self, seed=3, std=0.3)

    def forward(self, tokens_TD: Tensor) -> Tensor:
        return self.dispatcher(self.router(self.inputs._replace(tokens_TD=tokens_TD)), tokens_TD, self.experts)
