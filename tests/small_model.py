"""A VL-MoE small enough to build in milliseconds, and batches for it."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.model.backbones import ConnectorOptions, LIMoE, MoEDecoder, MoMa, VisionOptions, VLMoE
from lightning_moevlm.model.dispatch import Capacity, Dispatcher
from lightning_moevlm.model.experts import FreeExperts, GatedExperts, MLPExperts
from lightning_moevlm.model.initial_weights import defer_initialisation
from lightning_moevlm.model.layers import ModelStabilisers, MoEFFN, initialise
from lightning_moevlm.model.routers import Router, TopKRouter


@defer_initialisation()  # its weights are drawn once, by the seed
def small_vl_moe(
    *,
    top_k: int = 1,
    num_blocks: int = 4,
    num_vl_blocks: int = 1,
    num_experts: int = 4,
    sparse_modalities: tuple[Literal["image", "text"], ...] = ("image", "text"),
    capacity: Capacity | None = None,
    dispatcher: Dispatcher | None = None,
    router: Callable[[int, int], Router] | None = None,
    stabilisers: ModelStabilisers = ModelStabilisers(),
    causal: bool = False,
    is_gated: bool = False,
    free: Callable[[int], FreeExperts] | None = None,
    seed: int = 0,
) -> VLMoE:
    """Width 32, 2 heads, 16 px images in 8 px patches (4 of them), texts of 8 out of 300 tokens."""
    moe = small_moe(num_experts, router or partial(TopKRouter, top_k=top_k), capacity, dispatcher, free)
    if is_gated:
        moe = partial(moe, experts=partial(GatedExperts, hidden_dim=48))
    model = VLMoE(
        dim=32,
        num_heads=2,
        num_blocks=num_blocks,
        num_vl_blocks=num_vl_blocks,
        hidden_dim=64,
        image_size=16,
        patch_size=8,
        vocab_size=300,
        max_text_len=8,
        moe=moe,
        sparse_modalities=sparse_modalities,
        stabilisers=stabilisers,
        causal=causal,
    )
    initialise(model, seed)
    return model


@defer_initialisation()  # its weights are drawn once, by the seed
def small_limoe(
    *,
    top_k: int = 1,
    num_blocks: int = 4,
    num_experts: int = 4,
    is_sparse: bool = True,
    capacity: Capacity | None = None,
    dispatcher: Dispatcher | None = None,
    router: Callable[[int, int], Router] | None = None,
    stabilisers: ModelStabilisers = ModelStabilisers(),
    causal: bool = False,
    seed: int = 0,
) -> LIMoE:
    """The same widths, one mixture for both modalities in blocks 1 and 3."""
    model = LIMoE(
        dim=32,
        num_heads=2,
        num_blocks=num_blocks,
        hidden_dim=64,
        image_size=16,
        patch_size=8,
        vocab_size=300,
        max_text_len=8,
        moe=small_moe(num_experts, router or partial(TopKRouter, top_k=top_k), capacity, dispatcher),
        is_sparse=is_sparse,
        stabilisers=stabilisers,
        causal=causal,
    )
    initialise(model, seed)
    return model


@defer_initialisation()  # its weights are drawn once, by the seed
def small_moma(
    *,
    top_k: int = 1,
    num_blocks: int = 2,
    num_experts: int = 4,
    is_grouped: bool = True,
    is_sparse: bool = True,
    capacity: Capacity | None = None,
    dispatcher: Dispatcher | None = None,
    router: Callable[[int, int], Router] | None = None,
    stabilisers: ModelStabilisers = ModelStabilisers(),
    causal: bool = False,
    seed: int = 0,
) -> MoMa:
    """The same widths, a group of experts per modality in both blocks."""
    model = MoMa(
        dim=32,
        num_heads=2,
        num_blocks=num_blocks,
        hidden_dim=64,
        image_size=16,
        patch_size=8,
        vocab_size=300,
        max_text_len=8,
        moe=small_moe(num_experts, router or partial(TopKRouter, top_k=top_k), capacity, dispatcher),
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
    top_k: int = 1,
    num_blocks: int = 4,
    num_experts: int = 4,
    moe_every: int | None = 2,
    is_sparse: bool = True,
    sees_sparsely: bool = True,
    is_gated: bool = False,
    capacity: Capacity | None = None,
    dispatcher: Dispatcher | None = None,
    router: Callable[[int, int], Router] | None = None,
    stabilisers: ModelStabilisers = ModelStabilisers(),
    causal: Literal[True] = True,
    seed: int = 0,
) -> MoEDecoder:
    """The same widths, after a vision tower of width 24 and two blocks; with experts there and in the connector too."""
    moe = small_moe(num_experts, router or partial(TopKRouter, top_k=top_k), capacity, dispatcher)
    gated: Callable[[int], MoEFFN] = partial(moe, experts=partial(GatedExperts, hidden_dim=48))
    model = MoEDecoder(
        dim=32,
        num_heads=2,
        num_blocks=num_blocks,
        hidden_dim=48,
        image_size=16,
        patch_size=8,
        vocab_size=300,
        max_text_len=8,
        moe=gated if is_gated else moe,
        moe_every=moe_every,
        vision=VisionOptions(24, 2, 2, 48, moe if sees_sparsely else None),
        connector=ConnectorOptions(48, moe if sees_sparsely else None),
        is_gated=is_gated,
        is_sparse=is_sparse,
        stabilisers=stabilisers,
    )
    initialise(model, seed)
    return model


def small_moe(
    num_experts: int,
    router: Callable[[int, int], Router],
    capacity: Capacity | None,
    dispatcher: Dispatcher | None,
    free: Callable[[int], FreeExperts] | None = None,
) -> Callable[[int], MoEFFN]:
    """Experts of hidden width 48."""
    return partial(
        MoEFFN,
        num_experts=num_experts,
        router=router,
        experts=partial(MLPExperts, hidden_dim=48),
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
