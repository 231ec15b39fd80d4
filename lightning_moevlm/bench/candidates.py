"""Candidates of the layer bench: one step, forward and backward, of each way to compute a layer.

Every candidate has the same tokens and output gradient, frees its gradients first, and computes all of them: of the
tokens, of the weights, and of the router if it has one.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_moevlm.bench.cases import Case, Shape, Tokens
from lightning_moevlm.contracts.routing_plan import RoutingInput
from lightning_moevlm.model.dispatch import (
    AutoDispatcher,
    Dispatcher,
    Experts,
    GroupedDispatcher,
    PaddedDispatcher,
    SegmentDispatcher,
)
from lightning_moevlm.model.experts import GatedExperts, MLPExperts
from lightning_moevlm.model.routers import TopKRouter

DENSE, GEMM, OURS = "dense", "expert GEMMs", "auto"


class Candidate(NamedTuple):
    """A way to compute a layer.

    name: as in tables and records.
    step: one forward and backward pass.
    release: frees its gradients; None for the ceiling, which allocates nothing.
    """

    name: str
    step: Callable[[], object]
    release: Callable[[], None] | None = None


class DenseTwin(nn.Module):
    """The feed-forward of equal active matrix FLOPs: hidden width k f."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.k * shape.f
        self.up = nn.Linear(shape.d, width, bias=False)
        self.gate = nn.Linear(shape.d, width, bias=False) if shape.act == "swiglu" else None
        self.down = nn.Linear(width, shape.d, bias=False)

    def forward(self, tokens_TD: Tensor) -> Tensor:
        """Apply to every token."""
        up_TF = self.up(tokens_TD)
        return self.down(F.gelu(up_TF) if self.gate is None else F.silu(self.gate(tokens_TD)) * up_TF)


class Layer(nn.Module):
    """Our router, dispatcher and experts."""

    def __init__(self, case: Case, tokens: Tokens, dispatcher: Dispatcher) -> None:
        super().__init__()
        shape = case.shape
        self.router = TopKRouter(shape.d, shape.E, shape.k, renormalise=shape.k > 1)
        self.experts: Experts = (MLPExperts if shape.act == "gelu" else GatedExperts)(shape.d, shape.E, shape.f)
        self.dispatcher = dispatcher
        with torch.no_grad():
            self.router.weight_ED.copy_(tokens.router_ED)
            for stack in self.experts.stacks():
                nn.init.normal_(stack, std=0.02)

    def forward(self, tokens_TD: Tensor) -> Tensor:
        """Route and run."""
        num_tokens, device = tokens_TD.shape[0], tokens_TD.device
        modality_T = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        valid_T = torch.ones(num_tokens, dtype=torch.bool, device=device)
        plan = self.router(RoutingInput(tokens_TD, modality_T, valid_T))
        return self.dispatcher(plan, tokens_TD, self.experts)


def training(name: str, module: nn.Module, tokens: Tokens, shape_of_input: tuple[int, ...] | None = None) -> Candidate:
    """Make a candidate of a module from tokens to tokens (or to a tuple that begins with them)."""
    gradient = tokens.gradient_TD if shape_of_input is None else tokens.gradient_TD.view(shape_of_input)

    def release() -> None:
        module.zero_grad(set_to_none=True)

    def step() -> object:
        release()
        inputs = tokens.tokens_TD.detach().view(gradient.shape).requires_grad_()
        output = module(inputs)
        (output[0] if isinstance(output, tuple) else output).backward(gradient)
        return None

    return Candidate(name, step, release)


def expert_gemms(case: Case, tokens: Tokens) -> Callable[[], object]:
    """Return the ceiling: only the experts' matrix products, forward and backward, into existing buffers."""
    shape = case.shape
    lengths = torch.bincount(tokens.expert_TK.flatten(), minlength=shape.E).tolist()
    rows = shape.T * shape.k
    num_inner = 1 if shape.act == "gelu" else 2
    x_ND, y_ND, dx_ND = (torch.randn(rows, shape.d) for _ in range(3))
    inner = [torch.randn(shape.E, shape.d, shape.f) * 0.02 for _ in range(num_inner)]
    outer = torch.randn(shape.E, shape.f, shape.d) * 0.02
    inner_gradient, outer_gradient = [torch.empty_like(stack) for stack in inner], torch.empty_like(outer)
    hidden_NF = torch.randn(rows, shape.f)

    def step() -> None:
        start = 0
        for expert, length in enumerate(lengths):
            here = slice(start, start + length)
            start += length
            if not length:
                continue
            x, y, dx, hidden = x_ND[here], y_ND[here], dx_ND[here], hidden_NF[here]
            for stack, gradient in zip(inner, inner_gradient, strict=True):
                torch.mm(x, stack[expert], out=hidden)
                torch.mm(hidden, stack[expert].t(), out=dx)
                torch.mm(x.t(), hidden, out=gradient[expert])
            torch.mm(hidden, outer[expert], out=y)
            torch.mm(y, outer[expert].t(), out=hidden)
            torch.mm(hidden.t(), y, out=outer_gradient[expert])

    return step


def own_candidates(case: Case, tokens: Tokens) -> list[Candidate]:
    """Return the dense twin, the ceiling, and each of our fast dispatchers."""
    ours: dict[str, Dispatcher] = {
        OURS: AutoDispatcher(),
        "segments": SegmentDispatcher(),
        "grouped": GroupedDispatcher(),
        "padded": PaddedDispatcher(),
    }
    return [
        training(DENSE, DenseTwin(case.shape), tokens),
        Candidate(GEMM, expert_gemms(case, tokens)),
        *(training(name, Layer(case, tokens, each), tokens) for name, each in ours.items()),
    ]
