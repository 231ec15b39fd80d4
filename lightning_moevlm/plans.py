"""Routing plans: who goes where, said once, as an immutable record.

A router turns tokens into a plan, capacity turns a plan into a plan, a dispatcher runs it, losses and metrics
read it. Nobody else holds routing state, so every one of them can be exchanged or tested alone.

Plans are `NamedTuple`s: immutable, and pytree nodes for torch (DDP, checkpointing, compile) without registration.
"""

from enum import IntEnum
from typing import NamedTuple

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
    """What a router may look at.

    tokens_TD: float, the tokens to route. modality_T: int64, `Modality` values. valid_T: bool, False on padding.
    """

    tokens_TD: Tensor
    modality_T: Tensor
    valid_T: Tensor


class PairPlan(NamedTuple):
    """N routed pairs (token, expert, weight); shapes are static, so pairs are masked and never removed.

    token_N, expert_N: int64. weight_N: fp32 combine weight, carries the router's gradient. chosen_N: bool, what the
    router asked for: False on padding and on pairs that it did not take up. kept_N: bool, the chosen pairs that
    capacity left, which are the ones that run. logits_TE: fp32 raw scores, before noise and bias.
    probs_TE: fp32 over all E experts. modality_T: int64. valid_T: bool; padding is never routed, counted or in a loss.
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

    @property
    def num_experts(self) -> int:
        """E."""
        return self.logits_TE.shape[1]

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.logits_TE.shape[0]

    def detached(self) -> "PairPlan":
        """Return the same plan without gradients, for metrics."""
        return PairPlan(*(field.detach() for field in self))
