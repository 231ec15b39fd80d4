"""Which blocks have experts: every n-th, one half, the last n, or all.

null                  every `moe_every`-th block: GShard (arXiv 2006.16668), V-MoE "Every n" (arXiv 2106.05974)
{last: n, every: m}   n blocks, counted from the top in steps of m: V-MoE "Last n" with m = 2
first_half            the four placements that MoE-LLaVA compares (arXiv 2401.15947, section 4.3):
second_half           its "interval" is null with moe_every 2
all                   every block: MoMa (arXiv 2407.21770, section 4.1)
"""

from dataclasses import dataclass
from typing import Literal

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number


@dataclass(frozen=True)
class LastBlocks:
    """The last blocks.

    Args:
        last: how many blocks have experts.
        every: step from one to the next, counted from the top; 1 is neighbours, 2 is V-MoE.

    Raises:
        UserError: a number below 1.
    """

    last: int
    every: int = 1

    def __post_init__(self) -> None:
        """Check ranges."""
        check_number("moe_placement.last", self.last, least=1)
        check_number("moe_placement.every", self.every, least=1)


Placement = Literal["all", "first_half", "second_half"] | LastBlocks | None
"""null follows `moe_every`."""


def place_experts(num_blocks: int, moe_every: int, placement: Placement, is_dense: bool = False) -> frozenset[int]:
    """Return the indices of the blocks that have experts.

    Args:
        num_blocks: blocks that can have experts, the lowest ones of the model.
        moe_every: spacing that holds if `placement` is None.
        placement: which of them.
        is_dense: the blocks get the dense twin of experts, so there may be none.

    Raises:
        UserError: moe_every below 1, or no such block.
    """
    check_number("moe_every", moe_every, least=1, advice="; 1 is every block")
    blocks = range(num_blocks)
    if isinstance(placement, LastBlocks):
        found = blocks[::-1][:: placement.every][: placement.last]
        if len(found) < placement.last and not is_dense:
            raise UserError(
                f"moe_placement.last is {placement.last} with every {placement.every}: the model has {len(found)} such "
                f"blocks among the {num_blocks} that can be sparse; lower one of them"
            )
        return frozenset(found)
    spaced = blocks[moe_every - 1 :: moe_every]
    if not spaced and not is_dense and placement is None:
        raise UserError(
            f"moe_every = {moe_every} selects none of the {num_blocks} blocks that can be sparse; use 1 to "
            f"{num_blocks}, or the dense model"
        )
    half = num_blocks // 2
    found = {None: spaced, "all": blocks, "first_half": blocks[:half], "second_half": blocks[half:]}[placement]
    if not found and not is_dense:
        raise UserError(
            f"moe_placement {placement} selects none of the {num_blocks} blocks that can be sparse; use all, or the "
            "dense model"
        )
    return frozenset(found)
