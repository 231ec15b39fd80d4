"""Cases of the layer bench: shapes, and tokens whose routing is known beforehand.

Routers are real and their time counts, yet every candidate must route alike. So router rows are orthonormal, and each
token is made of the rows of the experts that it visits: any router that multiplies the two chooses those.
"""

from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError

Skew = Literal["balanced", "zipf"]
Act = Literal["gelu", "swiglu"]


@dataclass(frozen=True)
class Shape:
    """T tokens of width d, E experts of hidden width f and activation act, k per token."""

    T: int
    d: int
    f: int
    E: int
    k: int = 2
    act: Act = "swiglu"

    def __str__(self) -> str:
        """Describe the shape."""
        return f"T={self.T} d={self.d} f={self.f} E={self.E} k={self.k} {self.act}"


class Case(NamedTuple):
    """A shape under one routing."""

    shape: Shape
    skew: Skew


LAYER_CASES: tuple[Case, ...] = (
    *(Case(Shape(2048, 256, 1024, E, act=act), "balanced") for act in ("gelu", "swiglu") for E in (8, 16, 32, 64)),
    *(Case(Shape(2048, 256, 1024, 8, act=act), "zipf") for act in ("gelu", "swiglu")),
    *(Case(Shape(6144, 192, 768, 8), skew) for skew in ("balanced", "zipf")),
)


def select(cases: tuple[Case, ...], only: str | None) -> tuple[Case, ...]:
    """Return the cases that match "E=8" or "E=8,act=gelu,skew=zipf".

    Raises:
        UserError: no case matches.
    """
    wanted = dict(part.partition("=")[::2] for part in (only or "").split(",") if part)
    left = tuple(
        case
        for case in cases
        if all(str({**asdict(case.shape), "skew": case.skew}.get(name)) == value for name, value in wanted.items())
    )
    if not left:
        known = "; ".join(f"{case.shape} {case.skew}" for case in cases)
        raise UserError(f"--only {only} matches no case: give values of T, d, f, E, k, act or skew of one of: {known}")
    return left


class Tokens(NamedTuple):
    """Tokens with a known routing.

    tokens_TD: tokens to route.
    router_ED: orthonormal rows of the router.
    gradient_TD: gradient of the output.
    expert_TK: experts of the tokens.
    """

    tokens_TD: Tensor
    router_ED: Tensor
    gradient_TD: Tensor
    expert_TK: Tensor


def make_tokens(case: Case) -> Tokens:
    """Make tokens that a linear router sends to experts by the skew.

    Balanced: every expert gets T k / E pairs, as near as numbers allow. Zipf: expert i is drawn with weight
    1 / (i + 1), without replacement within a token; of 8 experts the busiest then has about 2.5 times the mean load.
    """
    shape, generator = case.shape, torch.Generator().manual_seed(0)
    if case.skew == "balanced":
        first_T = torch.arange(shape.T)[torch.randperm(shape.T, generator=generator)]
        expert_TK = (first_T.unsqueeze(-1) * shape.k + torch.arange(shape.k)) % shape.E
    else:
        weights_E = 1 / torch.arange(1, shape.E + 1)
        expert_TK = torch.multinomial(weights_E.expand(shape.T, shape.E), shape.k, generator=generator)
    random_DE = torch.randn(shape.d, shape.E, generator=generator)
    router_ED = torch.linalg.qr(random_DE).Q.t().contiguous()
    noise_TD = torch.randn(shape.T, shape.d, generator=generator)
    noise_TD -= noise_TD @ router_ED.t() @ router_ED
    strength_K = torch.linspace(4.0, 3.0, shape.k)  # clear choices, in order
    tokens_TD = noise_TD + (router_ED[expert_TK] * strength_K.view(1, -1, 1)).sum(dim=1)
    return Tokens(tokens_TD, router_ED, torch.randn(shape.T, shape.d, generator=generator), expert_TK)
