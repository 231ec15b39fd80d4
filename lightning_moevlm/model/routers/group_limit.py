"""A limit on where a token may go: its best groups of experts, and only experts within them.

    group score = sum of the largest scores in it (1 or more),   experts outside the best groups are not chosen

Device-limited routing of DeepSeek-V2 (arXiv 2405.04434, section 2.2.2: the largest score) and node-limited routing of
DeepSeek-V3 (arXiv 2412.19437: the sum of top_k / top_groups scores): with a group per device it bounds communication.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.model.routers.choices import check_top_k


@dataclass(frozen=True)
class GroupLimit:
    """The best groups of a token, by scores of all experts.

    Args:
        num_groups: groups of equal size, neighbours together; a divisor of the number of experts.
        top_groups: groups that a token may use.
        experts_per_score: how many of a group's largest scores make its own.

    Raises:
        UserError: numbers that do not fit each other.
    """

    num_groups: int = 2
    top_groups: int = 1
    experts_per_score: int = 2

    def __post_init__(self) -> None:
        check_number("groups.num_groups", self.num_groups, least=1)
        check_number("groups.experts_per_score", self.experts_per_score, least=1)
        check_number("groups.top_groups", self.top_groups, least=1, most=self.num_groups, advice=" (groups.num_groups)")

    def check(self, num_experts: int, top_k: int) -> None:
        """Refuse experts that the groups do not share evenly, and more choices than the best groups have.

        Raises:
            UserError: what does not fit.
        """
        if num_experts % self.num_groups:
            raise UserError(
                f"moe.num_experts {num_experts} is not a multiple of router.groups.num_groups {self.num_groups}: "
                "change one of them"
            )
        check_top_k(
            top_k, self.top_groups * (num_experts // self.num_groups), limit="experts of groups.top_groups groups"
        )

    def limit_scores(self, scores_TE: Tensor) -> Tensor:
        """Return the scores with minus infinity for experts outside of a token's best groups: (T, E)."""
        grouped = scores_TE.unflatten(-1, (self.num_groups, -1))
        own_scores = grouped.topk(min(self.experts_per_score, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
        best = torch.zeros_like(own_scores, dtype=torch.bool).scatter(
            -1, own_scores.topk(self.top_groups).indices, True
        )
        return grouped.masked_fill(~best.unsqueeze(-1), -torch.inf).flatten(-2)
