"""A VL-MoE small enough to build in milliseconds, and batches for it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypedDict, Unpack

import torch

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.model.backbones import ConnectorOptions, LIMoE, MoEDecoder, MoMa, VisionOptions, VLMoE
from lightning_moevlm.model.dispatch import Capacity, Dispatcher
from lightning_moevlm.model.experts import FreeExperts, GatedExperts, MLPExperts
from lightning_moevlm.model.initial_weights import defer_initialisation
from lightning_moevlm.model.layers import ModelStabilisers, MoEFFN, initialise
from lightning_moevlm.model.routers import Router, TopKRouter

SIZES: dict[str, Any] = {
    "dim": 32, "num_heads": 2, "image_size": 16, "patch_size": 8, "vocab_size": 300, "max_text_len": 8,
}  # fmt: skip


class MoEOptions(TypedDict, total=False):
    """Options of `small_moe`."""

    top_k: int
    num_experts: int
    router: Callable[[int, int], Router] | None
    capacity: Capacity | None
    dispatcher: Dispatcher | None
    free: Callable[[int], FreeExperts] | None


@defer_initialisation()  # its weights are drawn once, by the seed
def small_vl_moe(
    *,
    num_blocks: int = 4,
    num_vl_blocks: int = 1,
    sparse_modalities: tuple[Literal["image", "text"], ...] = ("image", "text"),
    stabilisers: ModelStabilisers = ModelStabilisers(),
    causal: bool = False,
    is_gated: bool = False,
    seed: int = 0,
    **moe: Unpack[MoEOptions],
) -> VLMoE:
    """Width 32, 2 heads, 16 px images in 8 px patches (4 of them), texts of 8 out of 300 tokens."""
    model = VLMoE(
        **SIZES,
        num_blocks=num_blocks,
        num_vl_blocks=num_vl_blocks,
        hidden_dim=64,
        moe=small_moe(is_gated, **moe),
        sparse_modalities=sparse_modalities,
        stabilisers=stabilisers,
        causal=causal,
    )
    initialise(model, seed)
    return model


@defer_initialisation()  # its weights are drawn once, by the seed
def small_limoe(
    *,
    num_blocks: int = 4,
    is_sparse: bool = True,
    stabilisers: ModelStabilisers = ModelStabilisers(),
    causal: bool = False,
    seed: int = 0,
    **moe: Unpack[MoEOptions],
) -> LIMoE:
    """The same widths, one mixture for both modalities in blocks 1 and 3."""
    model = LIMoE(
        **SIZES,
        num_blocks=num_blocks,
        hidden_dim=64,
        moe=small_moe(**moe),
        is_sparse=is_sparse,
        stabilisers=stabilisers,
        causal=causal,
    )
    initialise(model, seed)
    return model


@defer_initialisation()  # its weights are drawn once, by the seed
def small_moma(
    *,
    num_blocks: int = 2,
    is_grouped: bool = True,
    is_sparse: bool = True,
    stabilisers: ModelStabilisers = ModelStabilisers(),
    causal: bool = False,
    seed: int = 0,
    **moe: Unpack[MoEOptions],
) -> MoMa:
    """The same widths, a group of experts per modality in both blocks."""
    model = MoMa(
        **SIZES,
        num_blocks=num_blocks,
        hidden_dim=64,
        moe=small_moe(**moe),
        is_grouped=is_grouped,
        is_sparse=is_sparse,
        stabilisers=stabilisers,
        causal=causal,
    )
    initialise(model, seed)
    return model


@defer_initialisation()  # its weights are drawn once, by the seed
def small_decoder(
    *,
    num_blocks: int = 4,
    moe_every: int | None = 2,
    is_sparse: bool = True,
    sees_sparsely: bool = True,
    is_gated: bool = False,
    stabilisers: ModelStabilisers = ModelStabilisers(),
    causal: Literal[True] = True,
    seed: int = 0,
    **moe: Unpack[MoEOptions],
) -> MoEDecoder:
    """The same widths, after a vision tower of width 24 and two blocks; with experts there and in the connector too."""
    seeing = small_moe(**moe) if sees_sparsely else None
    model = MoEDecoder(
        **SIZES,
        num_blocks=num_blocks,
        hidden_dim=48,
        moe=small_moe(is_gated, **moe),
        moe_every=moe_every,
        vision=VisionOptions(24, 2, 2, 48, seeing),
        connector=ConnectorOptions(48, seeing),
        is_gated=is_gated,
        is_sparse=is_sparse,
        stabilisers=stabilisers,
    )
    initialise(model, seed)
    return model


def small_moe(
    is_gated: bool = False,
    *,
    top_k: int = 1,
    num_experts: int = 4,
    router: Callable[[int, int], Router] | None = None,
    capacity: Capacity | None = None,
    dispatcher: Dispatcher | None = None,
    free: Callable[[int], FreeExperts] | None = None,
) -> Callable[[int], MoEFFN]:
    """Experts of hidden width 48."""
    return partial(
        MoEFFN,
        num_experts=num_experts,
        router=router or partial(TopKRouter, top_k=top_k),
        experts=partial(GatedExperts if is_gated else MLPExperts, hidden_dim=48),
        capacity=capacity,
        dispatcher=dispatcher,
        free=free,
    )


def uneven_batch(num_samples: int, *, seed: int = 0) -> Batch:
    """Random pairs as of `pair_batch`, with texts of 1 to 5 words in turns."""
    batch = pair_batch(num_samples, seed=seed)
    assert batch.text_BL is not None
    num_words_B1 = torch.arange(num_samples).unsqueeze(-1) % 5 + 1
    position_L = torch.arange(batch.text_BL.shape[1])
    text_BL = torch.where(position_L <= num_words_B1, batch.text_BL, 0)
    text_BL = torch.where(position_L == num_words_B1 + 1, 3, text_BL)
    return batch._replace(text_BL=text_BL, text_mask_BL=text_BL != 0)


def cut(batch: Batch, size: int) -> list[Batch]:
    """The same pairs in batches of at most so many."""
    rows = [slice(start, start + size) for start in range(0, batch.num_samples, size)]
    return [Batch(*(field[part] for field in batch[:4])) for part in rows]  # type: ignore[index]


def pair_batch(num_samples: int = 4, *, seed: int = 0) -> Batch:
    """Random pairs: texts of 5 words between [BOS] = 2 and [EOS] = 3, one position of padding."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (num_samples, 3, 16, 16), generator=generator, dtype=torch.uint8)
    words = torch.randint(10, 300, (num_samples, 5), generator=generator)
    ends = (torch.full((num_samples, 1), token) for token in (2, 3, 0))
    begin, end, padding = ends
    text = torch.cat([begin, words, end, padding], dim=1)
    return Batch(images, text, text != 0, tuple(f"sample{index}" for index in range(num_samples)))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Change torch's default dtype, as Lightning does within a step under bf16-true."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
