"""Groups of tokens that are balanced together: all of a plan, or by sequence, by modality, or by both.

Groups are modality-major: group = modality x B + sequence. A loss is the mean over the groups that hold a valid
token, so its scale does not move with their number. The divisor of means, a `PlanSize`, is an argument: it may be
that of a whole optimiser step. Every shape follows from the plan's, so nothing is read
from the device; sums of floats are masked and not scattered, so that they add up in the same order each time.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.contracts.routing_plan import Modality, RoutingPlan
from lightning_moevlm.contracts.step_records import PlanSize


class Grouping(NamedTuple):
    """Splits the tokens of a plan into groups, by sequence, by modality, by both or not at all."""

    by_sequence: bool = False
    by_modality: bool = False

    def size(self, plan: RoutingPlan) -> int:
        """Return U, the number of groups, empty ones included."""
        return (plan.num_sequences if self.by_sequence else 1) * (len(Modality) if self.by_modality else 1)

    def group_T(self, plan: RoutingPlan) -> Tensor | None:
        """Return each token's group, int64; None: all are in one."""
        if not self.by_sequence:
            return plan.modality_T if self.by_modality else None
        if not self.by_modality:
            return plan.sequence_T
        return plan.sequence_T + plan.modality_T * plan.num_sequences

    def sums(self, values_TE: Tensor, plan: RoutingPlan) -> Tensor:
        """Return the sum over each group's valid tokens, (U, E)."""
        values_BSE = values_TE.unflatten(0, self._shape(plan))
        members = (member_T.view(self._shape(plan)).unsqueeze(-1) for member_T in self._members(plan))
        parts = [(values_BSE * member_BS1).sum(dim=1) for member_BS1 in members]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def tokens_U(self, size: PlanSize) -> Tensor:
        """Return the number of each group's valid tokens, (U,); groups are no sequences."""
        assert not self.by_sequence, "sequences are balanced one by one"
        return size.tokens_A if self.by_modality else size.tokens_A.sum().unsqueeze(0)

    def means(self, sums_UE: Tensor, size: PlanSize) -> Tensor:
        """Return the mean over each group's valid tokens, (U, E); 0 for a group without any."""
        return sums_UE / self.tokens_U(size).clamp(min=1).unsqueeze(-1)

    def over_groups(self, value_U: Tensor, size: PlanSize) -> Tensor:
        """Return the mean of a value over the groups that hold a valid token; 0 where none does."""
        present_U = self.tokens_U(size) > 0
        if not self.by_modality:
            return (value_U * present_U).squeeze(0)
        return (value_U * present_U).sum() / present_U.sum().clamp(min=1)

    def num_sequences(self, size: PlanSize) -> Tensor:
        """Return how many groups hold a valid token; groups are sequences."""
        assert self.by_sequence
        return size.sequences_A.sum() if self.by_modality else size.sequences

    def tokens_in_sequences(self, plan: RoutingPlan) -> Tensor:
        """Return the number of each group's valid tokens, int64 (U,), counted in the plan."""
        return torch.cat([member_T.view(self._shape(plan)).sum(dim=1) for member_T in self._members(plan)])

    def _shape(self, plan: RoutingPlan) -> tuple[int, int]:
        batch = plan.num_sequences if self.by_sequence else 1
        return batch, plan.num_tokens // batch

    def _members(self, plan: RoutingPlan) -> list[Tensor]:
        if not self.by_modality:
            return [plan.valid_T]
        return [plan.valid_T & (plan.modality_T == int(modality)) for modality in Modality]


def shares(counts_UE: Tensor, like: Tensor) -> Tensor:
    """Return counts divided by their sum over experts, in the dtype of `like`; 0 for a group without counts."""
    counts_UE = counts_UE.to(like.dtype)
    return counts_UE / counts_UE.sum(dim=-1, keepdim=True).clamp(min=1e-20)


def size_of(plan: RoutingPlan) -> PlanSize:
    """Return the size of a plan, int64."""
    return sizes_of([plan])[0]


def sizes_of(plans: Sequence[RoutingPlan]) -> list[PlanSize]:
    """Return the size of each plan, int64; plans of one shape are counted together."""
    by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, plan in enumerate(plans):
        by_shape[plan.num_sequences, plan.num_tokens // plan.num_sequences].append(number)
    sizes: dict[int, PlanSize] = {}
    for shape, numbers in by_shape.items():
        valid_PT = torch.stack([plans[number].valid_T for number in numbers])
        modality_PT = torch.stack([plans[number].modality_T for number in numbers])
        kinds = [valid_PT & (modality_PT == int(modality)) for modality in Modality]
        num_APB = torch.stack(kinds).unflatten(-1, shape).sum(dim=-1)
        has_APB = num_APB > 0
        counts = (num_APB.sum(dim=-1).unbind(1), has_APB.sum(dim=-1).unbind(1), has_APB.any(dim=0).sum(dim=-1).unbind())
        sizes |= {number: PlanSize(*own) for number, *own in zip(numbers, *counts, strict=True)}
    return [sizes[number] for number in range(len(plans))]
