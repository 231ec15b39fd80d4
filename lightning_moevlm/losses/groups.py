"""Which tokens are balanced together: all of a plan, those of one sequence, of one modality, or of both.

Groups are modality-major: group = modality x B + sequence. A loss is the mean over the groups that hold a valid
token, so its scale does not move with their number. Every shape follows from the plan's, so nothing is read from the
device; sums of floats are masked and not scattered, so that they add up in the same order each time.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.plans import Modality, RoutingPlan


class Grouping(NamedTuple):
    """How the tokens of a plan fall into groups.

    by_sequence, by_modality: what tells groups apart; neither leaves one group.
    """

    by_sequence: bool = False
    by_modality: bool = False

    def size(self, plan: RoutingPlan) -> int:
        """Return U, the number of groups, empty ones included."""
        return (plan.num_sequences if self.by_sequence else 1) * (len(Modality) if self.by_modality else 1)

    def group_T(self, plan: RoutingPlan) -> Tensor:
        """Return each token's group, int64."""
        group_T = plan.sequence_T if self.by_sequence else torch.zeros_like(plan.modality_T)
        if self.by_modality:
            group_T = group_T + plan.modality_T * (plan.num_sequences if self.by_sequence else 1)
        return group_T

    def sums(self, values_TE: Tensor, plan: RoutingPlan) -> Tensor:
        """Return the sum over each group's valid tokens, (U, E)."""
        values_BSE = values_TE.unflatten(0, self._shape(plan))
        members = (member_T.view(self._shape(plan)).unsqueeze(-1) for member_T in self._members(plan))
        return torch.cat([(values_BSE * member_BS1).sum(dim=1) for member_BS1 in members])

    def num_tokens(self, plan: RoutingPlan) -> Tensor:
        """Return the number of each group's valid tokens, int64 (U,)."""
        return torch.cat([member_T.view(self._shape(plan)).sum(dim=1) for member_T in self._members(plan)])

    def means(self, values_TE: Tensor, plan: RoutingPlan) -> Tensor:
        """Return the mean over each group's valid tokens, (U, E); 0 for a group without any."""
        return self.sums(values_TE, plan) / self.num_tokens(plan).clamp(min=1).unsqueeze(-1)

    def over_groups(self, value_U: Tensor, plan: RoutingPlan) -> Tensor:
        """Return the mean of a value over the groups that hold a valid token; 0 where none does."""
        present_U = (self.num_tokens(plan) > 0).to(value_U.dtype)
        return (value_U * present_U).sum() / present_U.sum().clamp(min=1)

    def _shape(self, plan: RoutingPlan) -> tuple[int, int]:
        batch = plan.num_sequences if self.by_sequence else 1
        return batch, plan.num_tokens // batch

    def _members(self, plan: RoutingPlan) -> list[Tensor]:
        if not self.by_modality:
            return [plan.valid_T]
        return [plan.valid_T & (plan.modality_T == modality) for modality in Modality]


def shares(counts_UE: Tensor, like: Tensor) -> Tensor:
    """Return counts divided by their sum over experts, in the dtype of `like`; 0 for a group without counts."""
    counts_UE = counts_UE.to(like.dtype)
    return counts_UE / counts_UE.sum(dim=-1, keepdim=True).clamp(min=1e-20)
