"""Routing plans: the experts of each token, as one immutable record.

A router turns tokens into a plan, capacity turns a plan into a plan, a dispatcher runs it, losses and metrics
read it. Routing state is nowhere else, so each of these parts can be exchanged or tested alone.

A `PairPlan` lists routed pairs (token, expert), a `MixPlan` holds soft slots. Both answer the same questions about
tokens, so that losses and metrics work with either.

Plans are `NamedTuple`s: immutable, and pytree nodes for torch (DDP, checkpointing, compile) without registration.
"""

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor


class Modality(IntEnum):
    """The kind of a token."""

    IMAGE = 0
    TEXT = 1

    @property
    def label(self) -> str:
        """Lower-case name, as in configs and metric keys."""
        return self.name.lower()


class RoutingInput(NamedTuple):
    """The input of a router.

    tokens_TD: float, the tokens to route: num_sequences samples of equal length, one after the other.
    modality_T: int64, `Modality` values.
    valid_T: bool, False on padding.
    identity_T: int64, token id or patch code; None if no router reads it.
    expert_TK: int64, experts chosen elsewhere, for routers that take choices; None lets the router choose.
    """

    tokens_TD: Tensor
    modality_T: Tensor
    valid_T: Tensor
    num_sequences: int = 1
    identity_T: Tensor | None = None
    expert_TK: Tensor | None = None


class PairPlan(NamedTuple):
    """N routed pairs (token, expert, weight); shapes are static, so pairs are masked and never removed.

    token_N, expert_N: int64.
    weight_N: fp32 combine weight, carries the router's gradient. Those of a token need not sum to 1.
    chosen_N: bool, the router's choices; False on padding and on pairs that it did not use.
    kept_N: bool, the chosen pairs within capacity; these run.
    logits_TE: fp32 raw scores, before noise and bias.
    probs_TE: fp32 over all E experts, whose sum is 1; 0 for a token without an expert of ReLURouter.
    modality_T: int64.
    valid_T: bool; padding is never routed, counted or in a loss.
    num_sequences: samples of the batch, of equal length, one after the other.
    noise_std_TE: fp32, standard deviation of the normal noise on the logits; None without noise.
    noisy_logits_TE: fp32, logits with that noise; None without noise.
    capacity_T: fp32, each token's capacity factor after rounding; None if nothing limits the experts.
    num_choices: K, if the pairs are the first choices of all tokens in order, then all second ones, and so on; None if
        they stand in any other order.
    """

    token_N: Tensor
    expert_N: Tensor
    weight_N: Tensor
    chosen_N: Tensor
    kept_N: Tensor
    logits_TE: Tensor
    probs_TE: Tensor
    modality_T: Tensor
    valid_T: Tensor
    num_sequences: int = 1
    noise_std_TE: Tensor | None = None
    noisy_logits_TE: Tensor | None = None
    capacity_T: Tensor | None = None
    num_choices: int | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.logits_TE.shape[1]

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.logits_TE.shape[0]

    @property
    def sequence_T(self) -> Tensor:
        """Index of each token's sample, int64."""
        return _sequence_T(self.valid_T, self.num_sequences)

    def by_token(self) -> Tensor:
        """Return the pairs ordered by token, in plan order within one, int64 (N)."""
        if self.num_choices is None:
            return self.token_N.argsort(stable=True)
        pair_N = torch.arange(self.token_N.shape[0], device=self.token_N.device)
        return pair_N.view(self.num_choices, self.num_tokens).t().reshape(-1)

    def chosen_loads(self, group_T: Tensor | None = None, num_groups: int = 1) -> Tensor:
        """Count the chosen pairs per group of tokens (None: one group) and expert: int64 (num_groups, E)."""
        return self._count_by(self.chosen_N, group_T, num_groups)

    def kept_loads(self, group_T: Tensor | None = None, num_groups: int = 1) -> Tensor:
        """Count the kept pairs per group of tokens and expert: int64 (num_groups, E)."""
        return self._count_by(self.kept_N, group_T, num_groups)

    def detach(self) -> "PairPlan":
        """Return the same plan without gradients, for metrics."""
        return self._replace(
            weight_N=self.weight_N.detach(),
            logits_TE=self.logits_TE.detach(),
            probs_TE=self.probs_TE.detach(),
            noise_std_TE=None if self.noise_std_TE is None else self.noise_std_TE.detach(),
            noisy_logits_TE=None if self.noisy_logits_TE is None else self.noisy_logits_TE.detach(),
        )

    def _count_by(self, pair_N: Tensor, group_T: Tensor | None, num_groups: int) -> Tensor:
        # no bincount: its output size would be read from the device
        zero = torch.zeros(num_groups * self.num_experts, dtype=torch.int64, device=self.expert_N.device)
        cell_N = self.expert_N if group_T is None else group_T[self.token_N] * self.num_experts + self.expert_N
        return zero.index_add_(0, cell_N, pair_N.to(torch.int64)).view(num_groups, self.num_experts)


class MixPlan(NamedTuple):
    """Soft slots: each of an expert's Z slots is a mix of its sequence's tokens, each token a mix of all slot outputs.

    dispatch_BEZS: fp32, sums to 1 over the sequence's S positions, padding excluded.
    combine_BSEZ: fp32, sums to 1 over all E x Z slots; 0 on padding.
    logits_TE: fp32, logsumexp of a token's scores over an expert's slots; its softmax is probs_TE.
    probs_TE: fp32, the share of each expert in a token's mix.
    modality_T: int64.
    valid_T: bool.
    """

    dispatch_BEZS: Tensor
    combine_BSEZ: Tensor
    logits_TE: Tensor
    probs_TE: Tensor
    modality_T: Tensor
    valid_T: Tensor
    num_sequences: int

    @property
    def num_experts(self) -> int:
        """E."""
        return self.logits_TE.shape[1]

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.logits_TE.shape[0]

    @property
    def sequence_T(self) -> Tensor:
        """Index of each token's sample, int64."""
        return _sequence_T(self.valid_T, self.num_sequences)

    def chosen_loads(self, group_T: Tensor | None = None, num_groups: int = 1) -> Tensor:
        """Return the share that each expert holds of each group's tokens: fp32 (num_groups, E), no gradient."""
        group_T = torch.zeros_like(self.modality_T) if group_T is None else group_T
        probs_TE = self.probs_TE.detach() * self.valid_T.unsqueeze(-1)
        return probs_TE.new_zeros(num_groups, self.num_experts).index_add(0, group_T, probs_TE)

    def kept_loads(self, group_T: Tensor | None = None, num_groups: int = 1) -> Tensor:
        """Return the same as `chosen_loads`: nothing is dropped."""
        return self.chosen_loads(group_T, num_groups)

    def detach(self) -> "MixPlan":
        """Return the same plan without gradients, for metrics."""
        return self._replace(
            dispatch_BEZS=self.dispatch_BEZS.detach(),
            combine_BSEZ=self.combine_BSEZ.detach(),
            logits_TE=self.logits_TE.detach(),
            probs_TE=self.probs_TE.detach(),
        )


def _sequence_T(valid_T: Tensor, num_sequences: int) -> Tensor:
    return torch.arange(valid_T.shape[0], device=valid_T.device) // max(1, valid_T.shape[0] // num_sequences)


RoutingPlan = PairPlan | MixPlan
"""The result of a router."""
