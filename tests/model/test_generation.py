"""Generation equals teacher forcing, whatever the method, the batch and the lengths of the prompts."""

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.special_tokens import BOS, EOS, PAD
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.dispatch import Capacity
from lightning_moevlm.model.experts import SiTUGLU
from lightning_moevlm.model.generation import Decoding, Generated, generate, sample_tokens
from lightning_moevlm.model.layers import ModelStabilisers, initialise
from lightning_moevlm.model.objectives import NextToken
from lightning_moevlm.model.routers import ExpertChoiceRouter, HashRouter
from tests.small_model import pair_batch, small_decoder, small_limoe, small_moma, small_vl_moe

BUILDERS = {
    "limoe": small_limoe,
    "vl_moe": small_vl_moe,
    "hash router": partial(small_limoe, router=HashRouter),
    "top-2": partial(small_limoe, top_k=2),
    "decoder": partial(small_decoder, top_k=2),
    "moma": small_moma,
    "gated attention": partial(small_decoder, stabilisers=ModelStabilisers(attention_gate="head")),
}


def model(build: Callable[..., Backbone]) -> tuple[Backbone, Callable[[Tensor], Tensor]]:
    backbone = build().eval()
    objective = NextToken(backbone.spec).eval()
    for module in (backbone, objective):
        initialise(module, 1, 0.3)  # wide enough for choices to differ
    return backbone, partial(objective.logits, backbone)


def prompts(num_samples: int = 5, *, at_most: int = 3) -> Batch:
    """Images with prompts of 1 to `at_most` tokens, [BOS] first."""
    batch = pair_batch(num_samples)
    length_B1 = torch.arange(num_samples).unsqueeze(1) % at_most + 1
    mask_BL = torch.arange(at_most) < length_B1
    return batch._replace(text_BL=torch.where(mask_BL, batch.text_BL[:, :at_most], PAD), text_mask_BL=mask_BL)


def run(backbone: Backbone, logits: Callable[[Tensor], Tensor], batch: Batch, **options: object) -> Generated:
    assert batch.text_BL is not None and batch.text_mask_BL is not None
    decoding = Decoding(**options)  # type: ignore[arg-type]
    return generate(backbone, logits, batch.images_BRYX, batch.text_BL, batch.text_mask_BL, decoding, batch.keys)


def joined(batch: Batch, row: int, tokens: list[int]) -> tuple[Tensor | None, Tensor, Tensor]:
    """One sample with its prompt and what follows, without padding in between."""
    prompt = batch.text_BL[row][batch.text_mask_BL[row]].tolist()
    text_1L = torch.tensor([prompt + tokens])
    images = None if batch.images_BRYX is None else batch.images_BRYX[row : row + 1]
    return images, text_1L, torch.ones_like(text_1L, dtype=torch.bool)


def teacher_forced(
    backbone: Backbone, logits: Callable[[Tensor], Tensor], batch: Batch, row: int, tokens: list[int]
) -> Tensor:
    """Log-probabilities (N, V) at the positions that predict `tokens`, in one pass over the whole text."""
    arguments = joined(batch, row, tokens)
    with torch.no_grad():
        features = backbone(*arguments, causal=True).tokens_BSD[0]
        return logits(features[-len(tokens) - 1 : -1]).log_softmax(dim=-1)


def until_end(row_N: Tensor) -> list[int]:
    tokens: list[int] = row_N.tolist()
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


@pytest.mark.parametrize("with_images", [True, False])
@pytest.mark.parametrize("name", BUILDERS)
def test_greedy_generation_is_teacher_forcing_token_for_token(name: str, with_images: bool) -> None:
    backbone, logits = model(BUILDERS[name])
    batch = prompts() if with_images else prompts()._replace(images_BRYX=None)
    found = run(backbone, logits, batch, max_new_tokens=5)
    for row in range(5):
        room = 8 - int(batch.text_mask_BL[row].sum())
        tokens = until_end(found.text_BN[row])[: min(room, 5)]
        log_prob_NV = teacher_forced(backbone, logits, batch, row, tokens)
        assert log_prob_NV.argmax(dim=-1).tolist() == tokens
        expected = sum(float(log_prob_NV[n, token]) for n, token in enumerate(tokens))
        assert float(found.log_prob_B[row]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("build", [small_limoe, small_decoder])
def test_a_text_does_not_depend_on_its_neighbours(build: Callable[..., Backbone]) -> None:
    backbone, logits = model(build)
    batch = prompts()
    for options in ({}, {"method": "beam", "num_beams": 3}, {"method": "sample", "seed": 3}):
        together = run(backbone, logits, batch, max_new_tokens=4, **options)
        for row in range(5):
            part = slice(row, row + 1)
            alone = run(
                backbone,
                logits,
                Batch(*(field[part] for field in batch[:4])),
                max_new_tokens=4,
                **options,  # type: ignore[index]
            )
            assert until_end(alone.text_BN[0]) == until_end(together.text_BN[row])[: alone.text_BN.shape[1]]


def test_a_text_ends_at_its_end_and_padding_follows() -> None:
    backbone, _ = model(small_limoe)
    calls = itertools.count()

    def logits(features_MD: Tensor) -> Tensor:
        """The first text ends at once, the second after two tokens, the others never."""
        step = next(calls)
        values = torch.zeros(len(features_MD), 300)
        values[:, 20 + step] = 5.0
        for row in ([0] if step == 0 else []) + ([1] if step == 2 else []):
            values[row, EOS] = 9.0
        return values

    found = run(backbone, logits, prompts(3, at_most=1), max_new_tokens=4)
    assert found.text_BN.tolist() == [[EOS, PAD, PAD, PAD], [20, 21, EOS, PAD], [20, 21, 22, 23]]


def test_generation_stops_when_every_text_has_ended() -> None:
    backbone, _ = model(small_limoe)

    def logits(features_MD: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(torch.full((len(features_MD),), EOS), 300) * 9.0

    for method in ("greedy", "beam"):
        assert run(backbone, logits, prompts(3), method=method, max_new_tokens=5).text_BN[:, 0].tolist() == [EOS] * 3
    assert run(backbone, logits, prompts(3), max_new_tokens=5).text_BN.shape == (3, 1)


def test_a_text_is_never_longer_than_the_backbone_embeds() -> None:
    backbone, logits = model(small_limoe)
    found = run(backbone, logits, prompts(4, at_most=7), max_new_tokens=50)
    lengths = [(row != PAD).sum() for row in found.text_BN]
    assert all(int(length) <= 8 - (row + 1) for row, length in enumerate(lengths))


@pytest.mark.parametrize("build", [small_vl_moe, small_decoder])
def test_wide_beams_find_the_likeliest_text(build: Callable[..., Backbone]) -> None:
    """Against all texts of two tokens of a small vocabulary."""
    backbone, logits = model(build)
    batch = prompts(2, at_most=1)

    def few(features_MD: Tensor) -> Tensor:
        values = logits(features_MD)
        values[:, 8:] = -torch.inf
        return values

    found = run(backbone, few, batch, method="beam", num_beams=64, max_new_tokens=2, length_penalty=0.0)
    for row in range(2):
        every = {}
        for first, second in itertools.product(range(8), range(8)):
            tokens = [first] if first == EOS else [first, second]
            log_prob_NV = teacher_forced(backbone, few, batch, row, tokens)
            every[tuple(tokens)] = sum(float(log_prob_NV[n, token]) for n, token in enumerate(tokens))
        best = max(every, key=every.__getitem__)
        assert tuple(until_end(found.text_BN[row])) == best
        assert float(found.log_prob_B[row]) == pytest.approx(every[best], rel=1e-4)


def test_one_beam_is_greedy() -> None:
    backbone, logits = model(small_limoe)
    greedy, beam = (run(backbone, logits, prompts(), **options) for options in ({}, {"method": "beam", "num_beams": 1}))
    assert torch.equal(greedy.text_BN, beam.text_BN)


def test_samples_have_the_asked_frequencies() -> None:
    probability = torch.tensor([0.5, 0.3, 0.15, 0.05])
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    logits = probability.log().expand(10_000, 4)
    counts = torch.bincount(sample_tokens(logits, uniform, 1.0, 1.0), minlength=4) / 10_000
    assert counts.tolist() == pytest.approx(probability.tolist(), abs=2e-3)
    nucleus = torch.bincount(sample_tokens(logits, uniform, 1.0, 0.75), minlength=4) / 10_000
    assert nucleus.tolist() == pytest.approx([0.625, 0.375, 0, 0], abs=2e-3)
    sharp = (probability.log() * 2).softmax(dim=0)
    cold = torch.bincount(sample_tokens(logits, uniform, 0.5, 1.0), minlength=4) / 10_000
    assert cold.tolist() == pytest.approx(sharp.tolist(), abs=2e-3)


def test_what_cannot_be_generated_is_refused() -> None:
    backbone, logits = model(partial(small_limoe, router=ExpertChoiceRouter))
    with pytest.raises(UserError, match="a causal model cannot use ExpertChoiceRouter"):
        run(backbone, logits, prompts())
    limited, logits = model(partial(small_limoe, capacity=Capacity(1.25, 1.25, priority="position")))
    with pytest.raises(UserError, match=r"set capacity\.eval_factor to null"):
        run(limited, logits, prompts())
    with pytest.raises(UserError, match="top_p"):
        Decoding(top_p=0.0)


@pytest.mark.parametrize(
    "build",
    [
        small_vl_moe,
        small_decoder,
        partial(small_vl_moe, is_gated=True, stabilisers=ModelStabilisers(attention_gate="element", glu=SiTUGLU(1, 1))),
    ],
)
def test_the_past_is_what_one_pass_computes(build: Callable[..., Backbone]) -> None:
    backbone, _ = model(build)
    batch = pair_batch(3)
    with torch.no_grad():
        whole = backbone(*batch[:3], causal=True).tokens_BSD[:, 4:7]
        start, past = backbone.prefill(batch.images_BRYX, batch.text_BL[:, :1], batch.text_mask_BL[:, :1])
        grown = [start.tokens_BSD[:, 4], *(backbone.extend(batch.text_BL[:, n], past) for n in (1, 2))]
    assert bool((batch.text_BL[:, 0] == BOS).all())
    assert torch.allclose(torch.stack(grown, dim=1), whole, atol=1e-5)
