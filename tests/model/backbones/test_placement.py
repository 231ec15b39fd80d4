"""Which blocks have experts, by hand."""

from functools import partial
from typing import Any

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.backbones import Backbone, LIMoE, MoMa, VLMoE
from lightning_moevlm.model.backbones.placement import LastBlocks, Placement, place_experts
from lightning_moevlm.model.layers import Block, MoEFFN

SIZES: dict[str, Any] = {
    "dim": 8, "num_heads": 1, "num_blocks": 6, "hidden_dim": 8, "image_size": 8, "patch_size": 8, "vocab_size": 9,
    "max_text_len": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("num_blocks", "moe_every", "placement", "expected"),
    [
        (6, 2, None, {1, 3, 5}),
        (7, 3, None, {2, 5}),
        (6, 2, "all", {0, 1, 2, 3, 4, 5}),
        (7, 2, "first_half", {0, 1, 2}),
        (7, 2, "second_half", {3, 4, 5, 6}),
        (6, 2, LastBlocks(2), {4, 5}),
        (12, 2, LastBlocks(2, every=2), {9, 11}),  # V-MoE "Last 2"
        (6, 2, LastBlocks(6), {0, 1, 2, 3, 4, 5}),
    ],
)
def test_the_blocks_of_each_placement(
    num_blocks: int, moe_every: int, placement: Placement, expected: set[int]
) -> None:
    assert place_experts(num_blocks, moe_every, placement) == expected


def sparse(model: Backbone) -> list[int]:
    """The blocks with experts."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    return [index for index, block in enumerate(blocks) if any(isinstance(part, MoEFFN) for part in block.modules())]


@pytest.mark.parametrize("family", [partial(VLMoE, num_vl_blocks=0), LIMoE, MoMa])
def test_every_family_places_its_experts(family: Any) -> None:
    assert sparse(family(**SIZES, moe_placement="second_half")) == [3, 4, 5]
    assert sparse(family(**SIZES, moe_every=3)) == [2, 5]


def test_the_top_of_vl_moe_counts_only_if_it_may_be_sparse() -> None:
    assert sparse(VLMoE(**SIZES, moe_placement=LastBlocks(1))) == [3]  # below the top 2
    assert sparse(VLMoE(**SIZES, moe_placement=LastBlocks(1), sparse_top=True)) == [5]


@pytest.mark.parametrize(
    ("num_blocks", "moe_every", "placement", "message"),
    [
        (6, 0, "all", "moe_every is 0"),
        (6, 2, LastBlocks(4, every=2), "moe_placement.last is 4 with every 2: the model has 3 such blocks among the 6"),
        (1, 2, "first_half", "moe_placement first_half selects none of the 1 blocks that can be sparse; use all"),
        (2, 3, None, "moe_every = 3 selects none of the 2 blocks that can be sparse; use 1 to 2"),
    ],
)
def test_a_placement_without_a_block_is_refused(
    num_blocks: int, moe_every: int, placement: Placement, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        place_experts(num_blocks, moe_every, placement)
    if moe_every:
        place_experts(num_blocks, moe_every, placement, is_dense=True)


@pytest.mark.parametrize(("options", "key"), [({"last": 0}, "last"), ({"last": 1, "every": 0}, "every")])
def test_numbers_below_one_are_refused(options: dict[str, int], key: str) -> None:
    with pytest.raises(UserError, match=f"moe_placement.{key} is 0"):
        LastBlocks(**options)
