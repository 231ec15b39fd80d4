"""The switches that every learned router has, on every learned router."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import PairPlan
from lightning_moevlm.model.layers import initialise
from lightning_moevlm.model.routers import CosineRouter, Gate, ReLURouter, Router, SoftRouter
from tests.model.routers.test_routers import LEARNED, ROUTERS
from tests.routing import routing_input

EVERY: dict[str, Callable[[], Router]] = {name: ROUTERS[name] for name in LEARNED} | {"soft": lambda: SoftRouter(16, 8)}
NEVER_LEAVES_ZERO = ("ReLU", "cosine", "soft")


def build(name: str, **switches: float) -> Router:
    """The router with these switches of its gate and no others."""
    router = EVERY[name]()
    router.gate = replace(router.gate, **({"jitter": 0.0, "dropout": 0.0} | switches))
    initialise(router, seed=0, std=0.5)
    return router


def logits(router: Router, training: bool, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    plan = router.train(training)(routing_input(40, 16))
    noisy_TE = plan.noisy_logits_TE if isinstance(plan, PairPlan) else None
    return plan.logits_TE if noisy_TE is None else noisy_TE


@pytest.mark.parametrize("switch", ["jitter", "dropout"])
@pytest.mark.parametrize("name", EVERY)
def test_noise_on_the_inputs_acts_in_training_alone(name: str, switch: str) -> None:
    router = build(name, **{switch: 0.2})
    assert not torch.equal(logits(router, True, seed=0), logits(router, True, seed=1))
    assert torch.equal(logits(router, True, seed=0), logits(router, True, seed=0))
    assert torch.equal(logits(router, False), logits(build(name), False))


@pytest.mark.parametrize("name", EVERY)
def test_temperature_divides_scores(name: str) -> None:
    plain, softer = build(name), build(name, temperature=EVERY[name]().gate.temperature * 2)
    one_TE, half_TE = logits(plain, False), logits(softer, False)
    if name == "soft":  # logits are the logsumexp of two slots' scores each
        plan = softer(routing_input(40, 16))
        torch.testing.assert_close(plan.probs_TE, half_TE.softmax(dim=-1))
        assert float(half_TE.detach().std()) < float(one_TE.detach().std())
    else:
        torch.testing.assert_close(half_TE, one_TE / 2)


@pytest.mark.parametrize("name", [name for name in EVERY if not name.startswith(NEVER_LEAVES_ZERO)])
def test_a_router_may_start_undecided_and_learns_all_the_same(name: str) -> None:
    router = build(name, initial_std=0.0)
    plan = router.train()(routing_input(40, 16))
    assert torch.equal(plan.logits_TE, torch.zeros(40, 8))
    assert bool(plan.chosen_N.any())
    (plan.weight_N * plan.kept_N * torch.linspace(-1, 1, plan.weight_N.shape[0])).sum().backward()
    rows = router.rows()
    assert rows is not None and rows.grad is not None and float(rows.grad.abs().sum()) > 0
    assert bool(rows.grad.isfinite().all())


@pytest.mark.parametrize(
    "router",
    [
        lambda gate: ReLURouter(16, 8, gate=gate),
        lambda gate: CosineRouter(16, 8, gate=gate),
        lambda gate: SoftRouter(16, 8, gate=gate),
    ],
    ids=NEVER_LEAVES_ZERO,
)
def test_a_router_that_could_not_leave_zero_refuses_to_start_there(router: Callable[[Gate], Router]) -> None:
    with pytest.raises(UserError, match=r"gate\.initial_std is 0, and \w+Router would never learn from there: .*1e-3"):
        router(Gate(initial_std=0.0))
    small = router(Gate(initial_std=1e-3))
    initialise(small, seed=0, std=0.5)
    rows = small.rows()
    assert rows is not None and 0 < float(rows.detach().std()) < 2e-3
