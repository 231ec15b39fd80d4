"""Times dispatchers on the experts of a layer, and matrix products of the CPU.

It leaves gradients, random numbers and saved tensors of the surrounding training alone. It runs in the caller's thread,
because glibc hands large tensors of another thread's arena back at once. With one thread a step is timed by the CPU
time of the process, which neighbours do not change; with more by the wall clock, because threads wait.
"""

import random
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_moevlm.contracts.routing_plan import PairPlan
from lightning_moevlm.model.dispatch.auto.timings_table import Case, Row
from lightning_moevlm.model.dispatch.dispatcher import Dispatcher, matmul_dtype
from lightning_moevlm.model.dispatch.expert_protocol import Experts

ROUNDS = 9
_FEWEST_ROUNDS = 3
_SECONDS = 4.0  # after them no further round is begun
_PRODUCT = 1024


@torch.inference_mode(False)
def measure_row(
    case: Case,
    plan: PairPlan,
    tokens_TD: Tensor,
    experts: Experts,
    dispatchers: Mapping[str, Dispatcher],
    rounds: int = ROUNDS,
) -> Row:
    """Time forward and backward of each dispatcher with as many pairs, evenly over the experts."""
    is_autocast, dtype = torch.is_autocast_enabled(tokens_TD.device.type), matmul_dtype(tokens_TD)
    generator = torch.Generator().manual_seed(0)
    even = _balance_loads(plan, generator)
    values_TD = torch.randn(tokens_TD.shape, generator=generator).to(tokens_TD.dtype)
    wanted = [parameter for parameter in experts.parameters() if parameter.requires_grad]

    def step(dispatcher: Dispatcher) -> None:
        tokens = values_TD.detach().requires_grad_()
        weight_N = even.weight_N.detach().requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=is_autocast, cache_enabled=False):
            out_TD = dispatcher.run_pairs(even._replace(weight_N=weight_N), tokens, experts)
        torch.autograd.grad(out_TD, [tokens, weight_N, *wanted], values_TD, allow_unused=True)

    steps = {name: partial(step, dispatcher) for name, dispatcher in dispatchers.items()}
    # experts may drop out; recomputation counts what is saved, unless other hooks take it
    with torch.random.fork_rng(devices=[]), saved_tensors_hooks(_as_it_is, _as_it_is), torch.enable_grad():
        seconds = _interleave(steps, rounds)
    return Row(case, {name: round(1e3 * each, 4) for name, each in seconds.items()})


def measure_products() -> dict[str, float]:
    """Return TFLOP/s of products of two square matrices of 1024, by dtype."""
    steps: dict[str, Callable[[], object]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        one, other = (torch.ones(_PRODUCT, _PRODUCT, dtype=dtype) for _ in range(2))
        steps[str(dtype).removeprefix("torch.")] = partial(torch.mm, one, other)
    seconds = _interleave(steps, ROUNDS)
    return {name: float(f"{2e-12 * _PRODUCT**3 / each:.3g}") for name, each in seconds.items()}


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _balance_loads(plan: PairPlan, generator: torch.Generator) -> PairPlan:
    """Return a plan whose kept pairs, of the same tokens, choose each expert equally often."""
    token_N, expert_N, kept_N = plan.token_N.clone(), plan.expert_N.clone(), plan.kept_N.clone()  # none of inference
    num_kept = int(kept_N.sum())
    expert_N[kept_N] = torch.randperm(num_kept, generator=generator) % plan.num_experts
    weight_N = torch.where(kept_N, 0.5, 0.0)
    return plan._replace(token_N=token_N, expert_N=expert_N, weight_N=weight_N, chosen_N=kept_N, kept_N=kept_N)


def _interleave(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the second-smallest time of each, because the smallest may be a fluke; in random order each round."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    begun = time.perf_counter()
    for number in range(rounds):
        if number >= _FEWEST_ROUNDS and time.perf_counter() - begun > _SECONDS:
            break
        for name in order.sample(list(steps), len(steps)):
            start = clock()
            steps[name]()
            times[name].append(clock() - start)
    return {name: sorted(each)[min(1, len(each) - 1)] for name, each in times.items()}
