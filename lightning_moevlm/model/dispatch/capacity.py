"""Expert capacity: at most `places` pairs per expert, routing group and, where asked, modality; the rest is dropped to
the residual.

    places = ceil(factor x chosen pairs of the group / E), rounded up to a multiple

Pairs that stay when an expert is full:

- "position": first choices before second ones, then earlier tokens before later (Switch, arXiv 2101.03961, section
  2.2);
- "gate": first choices before second ones, then tokens with the larger best gate: batch-priority routing (V-MoE, arXiv
  2106.05974, section 4.1);
- "probability": every pair by its own weight (Megatron-LM's drop policy "probs");
- "token": earlier tokens before later ones, each with all its choices. No later token takes a place of an earlier one,
  so causal models may use it with several experts per token.

The factor after both roundings is larger than the nominal one. Plans carry it (`capacity_T`), and telemetry logs it.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.routing_plan import Modality, PairPlan
from lightning_moevlm.contracts.schedules import Ramp, value_at
from lightning_moevlm.model.dispatch.capacity_rule import ByDropRate

Priority = Literal["position", "gate", "probability", "token"]


@dataclass(frozen=True)
class ModalityFactors:
    """A capacity factor per modality: each has places of its own, so the larger one cannot crowd out the smaller.

    Args:
        image: factor on the image pairs; null is dropless.
        text: factor on the text pairs; null is dropless.
    """

    image: float | None = 1.25
    text: float | None = 1.25


Factor = float | ModalityFactors | Tensor

TrainFactor = float | ModalityFactors | Ramp | ByDropRate
"""A constant, one per modality, a ramp over optimiser steps, or one that follows the share of dropped pairs."""


@dataclass(frozen=True)
class Capacity:
    """Capacity factors of training and evaluation; null is dropless.

    Args:
        train_factor: typically 1.0 to 1.25; one number, or one per modality, `{image: 1.25, text: 2.0}`; a ramp over
            optimiser steps, `{start: 2.0, stop: 1.0, num_steps: 1000}`; or steered to a drop rate, `{drop_rate: 0.02}`.
        eval_factor: null by default. With a limit, the output for a sample depends on the other samples of its batch or
            group. Can be swept without retraining.
        priority: pairs that stay when an expert is full: first choices and early tokens (position), large best gates
            (gate), large weights (probability), or early tokens with all their choices (token).
        group_size: number of samples that share places; null is the whole micro-batch.
        multiple_of: round places up to a multiple of this (V-MoE: 4).

    Raises:
        UserError: a factor, a group or a multiple that is not positive.
    """

    train_factor: float | ModalityFactors | Ramp | ByDropRate | None = 1.25
    eval_factor: float | ModalityFactors | None = None
    priority: Priority = "position"
    group_size: int | None = None
    multiple_of: int = 1

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("train_factor", "eval_factor"):
            for factor in list_factors(getattr(self, name)):
                if factor is not None:
                    check_number(name, factor, above=0, advice=", typically 1.0 to 2.0, or null for dropless")
        if self.group_size is not None and self.group_size < 1:
            raise UserError(f"group_size is {self.group_size}: choose at least 1 sample, or null for the whole batch")
        if self.multiple_of < 1:
            raise UserError(f"multiple_of is {self.multiple_of}: choose 1 (no rounding) or more")

    @property
    def competes(self) -> bool:
        """True if later positions can take the place of earlier ones; causal models refuse it."""
        return self.priority not in ("position", "token")

    @property
    def evaluation_limit(self) -> str | None:
        """The capacity factor of evaluation as text; None if evaluation is dropless."""
        factor = self.eval_factor
        if isinstance(factor, ModalityFactors):
            limits = [f"{name} {value:g}" for name, value in vars(factor).items() if value is not None]
            return ", ".join(limits) or None
        return None if factor is None else f"{factor:g}"

    @property
    def changes(self) -> bool:
        """True if the factor of training changes between steps."""
        return isinstance(self.train_factor, Ramp | ByDropRate)

    def factor(self, training: bool, in_force: Tensor | None = None) -> Factor | None:
        """Return the factor of a mode; in_force: that of the current step if it changes, None in the first step."""
        if not training:
            return self.eval_factor
        if isinstance(self.train_factor, Ramp | ByDropRate):
            first = value_at(self.train_factor, 0) if isinstance(self.train_factor, Ramp) else self.train_factor.start
            return first if in_force is None else in_force
        return self.train_factor


class _Shares(NamedTuple):
    """Pools of places.

    share_T: int64, pool of each token (by group, and by modality if it has its own factor); None: there is one pool.
    share_N: as share_T, per pair.
    factor_S: nominal factor of each pool, or of all; infinite where dropless.
    """

    share_T: Tensor | None
    share_N: Tensor | None
    factor_S: float | Tensor

    def count_pairs(self, pair_N: Tensor) -> Tensor:
        """Return the number of these pairs in each pool, fp64."""
        # counted in integers, which every back-end of torch.compile can add by index
        if self.share_N is None:
            return pair_N.sum().double()
        assert isinstance(self.factor_S, Tensor)
        asked_S = torch.zeros(self.factor_S.shape, dtype=torch.int64, device=pair_N.device)
        return asked_S.index_add(0, self.share_N, pair_N.to(torch.int64)).double()


def list_factors(factor: TrainFactor | None) -> tuple[float | None, ...]:
    """Return the constants that a factor is given by; null is dropless, and one that adapts checks its own."""
    match factor:
        case ModalityFactors():
            return factor.image, factor.text
        case Ramp():
            return factor.start, factor.stop
        case ByDropRate():
            return ()
    return (factor,)


def apply_capacity(plan: PairPlan, capacity: Capacity, training: bool, in_force: Tensor | None = None) -> PairPlan:
    """Return the plan with pairs over capacity no longer kept, and the real factor; order, shapes and weights stay.

    in_force: the factor of the current step, a scalar, if it changes while training.
    """
    factor = capacity.factor(training, in_force)
    if factor is None:
        return plan
    shares = _shares(plan, factor, capacity.group_size)
    asked_S = shares.count_pairs(plan.kept_N)
    # in float64 and with a little slack: 1.2 * 25 / 3 is 10, not the 11 of rounding errors
    places_S = torch.ceil(asked_S * shares.factor_S / plan.num_experts - 1e-9)
    if capacity.multiple_of > 1:
        places_S = torch.ceil(places_S / capacity.multiple_of) * capacity.multiple_of
    real_S = torch.where(asked_S > 0, places_S * plan.num_experts / asked_S, shares.factor_S).float()
    rank_N = _rank(plan, shares.share_N, capacity.priority)
    if shares.share_T is None or shares.share_N is None:
        fits_N, real_T = rank_N < places_S, real_S.expand(plan.num_tokens)
    else:  # 0 x infinity, a dropless share without pairs, has nothing that could fit
        fits_N, real_T = rank_N < places_S[shares.share_N], real_S[shares.share_T]
    return plan._replace(kept_N=plan.kept_N & fits_N, capacity_T=real_T)


def _shares(plan: PairPlan, factor: Factor, group_size: int | None) -> _Shares:
    size = max(1, plan.num_sequences if group_size is None else group_size)
    num_groups = -(-plan.num_sequences // size) or 1
    device = plan.token_N.device
    if not isinstance(factor, ModalityFactors):
        nominal = factor.to(device, torch.float64) if isinstance(factor, Tensor) else factor
        if num_groups == 1:
            return _Shares(None, None, nominal)
        group_T = plan.sequence_T // size
        factor_S = torch.ones(num_groups, dtype=torch.float64, device=device) * nominal
        return _Shares(group_T, group_T[plan.token_N], factor_S)
    image, text = (torch.inf if each is None else each for each in (factor.image, factor.text))
    factor_GA = torch.full((num_groups, len(Modality)), text, dtype=torch.float64, device=device)
    factor_GA[:, int(Modality.IMAGE)].fill_(image)  # no copy from the host
    share_T = plan.sequence_T // size * len(Modality) + plan.modality_T
    return _Shares(share_T, share_T[plan.token_N], factor_GA.flatten())


def _rank(plan: PairPlan, share_N: Tensor | None, priority: Priority) -> Tensor:
    """Return how many kept pairs of the same expert and share come before each pair."""
    bucket_N = plan.expert_N if share_N is None else share_N * plan.num_experts + plan.expert_N
    order_N = _order(plan, priority)
    bucket_N, place_N = torch.where(plan.kept_N, bucket_N, -1)[order_N].sort(stable=True)
    position_N = torch.arange(order_N.shape[0], device=order_N.device)
    start_N = torch.searchsorted(bucket_N, bucket_N)  # where the bucket of each starts
    return torch.empty_like(position_N).scatter_(0, order_N[place_N], position_N - start_N)


def _order(plan: PairPlan, priority: Priority) -> Tensor:
    """Return the pairs in the order in which they are served."""
    if priority == "probability":
        return plan.weight_N.argsort(descending=True, stable=True)
    if priority == "position":
        return torch.arange(plan.token_N.shape[0], device=plan.token_N.device)
    if priority == "token":
        return plan.by_token()
    gate_N = torch.where(plan.kept_N, plan.weight_N.detach(), -torch.inf)
    if plan.num_choices is not None:
        best_T = gate_N.view(plan.num_choices, plan.num_tokens).amax(dim=0)
        first_K1 = torch.arange(plan.num_choices, device=gate_N.device).unsqueeze(-1) * plan.num_tokens
        return (first_K1 + best_T.argsort(descending=True, stable=True)).flatten()
    best_T = gate_N.new_full((plan.num_tokens,), -torch.inf).scatter_reduce_(0, plan.token_N, gate_N, "amax")
    by_gate_N = best_T[plan.token_N].argsort(descending=True, stable=True)
    return by_gate_N[_choice(plan)[by_gate_N].argsort(stable=True)]


def _choice(plan: PairPlan) -> Tensor:
    """Return which choice of its token each pair is, 0 for the first, by the order of the pairs."""
    token_N, order_N = plan.token_N.sort(stable=True)
    position_N = torch.arange(order_N.shape[0], device=order_N.device)
    return torch.empty_like(position_N).scatter_(0, order_N, position_N - torch.searchsorted(token_N, token_N))
