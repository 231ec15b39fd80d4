"""Attention sees what it may see; its cap and its largest logits by hand."""

import math
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.sequence_layout import Layout, Span
from lightning_moevlm.model.layers import Attention, ModelStabilisers, initialise
from lightning_moevlm.model.layers.attention import allowed_keys, attend_with_cap, largest_logits
from tests.counting import count_flops, kept_bytes

TEXT = (Span(Modality.TEXT, 0, 4),)
PAIR = (Span(Modality.IMAGE, 0, 2), Span(Modality.TEXT, 2, 4))
SWITCHES = [
    ModelStabilisers(),
    ModelStabilisers(qk_norm=False),
    ModelStabilisers(logit_cap=1.0),
    ModelStabilisers(sub_norm=True),
    ModelStabilisers(attention_gate="head"),
    ModelStabilisers(attention_gate="element", sub_norm=True),
]


def attention(stabilisers: ModelStabilisers) -> Attention:
    layer = Attention(16, 4, stabilisers)
    initialise(layer, seed=0, std=0.3)
    return layer


def layout(spans: tuple[Span, ...] = TEXT, num_padding: int = 0, causal: bool = False) -> Layout:
    return Layout(spans, (torch.arange(4) < 4 - num_padding).unsqueeze(0), causal=causal)


def random_tokens() -> Tensor:
    return torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("stabilisers", SWITCHES)
def test_padding_is_not_attended_to(stabilisers: ModelStabilisers) -> None:
    tokens = random_tokens()
    other = tokens.clone()
    other[:, 3] = 50.0
    layer, padded = attention(stabilisers), layout(num_padding=1)
    torch.testing.assert_close(layer(tokens, padded).tokens_BSD[:, :3], layer(other, padded).tokens_BSD[:, :3])
    other[:, 2] = 50.0
    assert not torch.allclose(layer(tokens, padded).tokens_BSD[:, :2], layer(other, padded).tokens_BSD[:, :2])


def test_qk_norm_makes_attention_blind_to_the_scale_of_its_input() -> None:
    tokens = random_tokens()
    normed, plain = (attention(ModelStabilisers(qk_norm=on)) for on in (True, False))
    torch.testing.assert_close(
        normed(tokens * 10, layout()).tokens_BSD, normed(tokens, layout()).tokens_BSD * 10, rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(
        plain(tokens * 10, layout()).tokens_BSD, plain(tokens, layout()).tokens_BSD * 10, rtol=1e-2, atol=1e-2
    )


def test_cap_by_hand() -> None:
    # one head of width 1, query 1, keys 0 and 100: logits 0 and 100, capped at 2: 0 and 2 tanh(50) = 2
    # values 0 and 1: the second one's weight is e^2 / (1 + e^2)
    query, key, value = (torch.tensor(values).view(1, 1, -1, 1) for values in ([1.0], [0.0, 100.0], [0.0, 1.0]))
    output = attend_with_cap(query, key, value, torch.ones(1, 1, 1, 2, dtype=torch.bool), logit_cap=2.0)
    assert output.item() == pytest.approx(math.exp(2) / (1 + math.exp(2)))


def test_a_cap_that_nothing_reaches_is_torchs_own_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 4, generator=generator, requires_grad=True) for _ in range(3))
    allowed = torch.rand(2, 1, 5, 5, generator=generator) < 0.7
    allowed |= torch.eye(5, dtype=torch.bool)
    capped = attend_with_cap(query, key, value, allowed, logit_cap=1e4)
    fused = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
    torch.testing.assert_close(capped, fused)
    for ours, theirs in zip(
        *(torch.autograd.grad(o.square().sum(), (query, key, value)) for o in (capped, fused)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


GATES = pytest.mark.parametrize(("kind", "num_gates"), [("head", 4), ("element", 16)])


@GATES
def test_a_gate_weighs_each_head_by_hand(kind: Literal["head", "element"], num_gates: int) -> None:
    # the first channel is 1 everywhere: weights of ln 3, 0, -ln 3 and 50 on it open the heads by 3/4, 1/2, 1/4 and 1
    plain, gated = attention(ModelStabilisers()), attention(ModelStabilisers(attention_gate=kind))
    assert gated.gate is not None and gated.gate.weight.shape == (num_gates, 16)
    shared = dict(plain.named_parameters())
    assert all(torch.equal(value, shared[name]) for name, value in gated.named_parameters() if name in shared)
    tokens = random_tokens()
    tokens[..., 0] = 1.0
    with torch.no_grad():
        gated.gate.weight.zero_()
        gated.gate.weight[:, 0] = torch.tensor([math.log(3), 0.0, -math.log(3), 50.0]).repeat_interleave(num_gates // 4)
        for layer in (plain, gated):
            layer.out.weight.copy_(torch.eye(16))
    opened = torch.tensor([0.75, 0.5, 0.25, 1.0]).repeat_interleave(4)
    expected = plain(tokens, layout()).tokens_BSD * opened
    torch.testing.assert_close(gated(tokens, layout()).tokens_BSD, expected)
    torch.testing.assert_close(
        gated(tokens, layout(), measure=True).logit_max_H, plain(tokens, layout(), measure=True).logit_max_H
    )


@GATES
def test_what_a_gate_costs_is_counted(kind: Literal["head", "element"], num_gates: int) -> None:
    # 2 FLOPs x 4 tokens x 16 channels x gates more; 4 gates' values and 4 x 16 gated outputs are kept
    plain, gated = attention(ModelStabilisers()), attention(ModelStabilisers(attention_gate=kind))
    more = [layer.costs(4).flops for layer in (gated, plain)]
    assert more[0] - more[1] == 2 * 4 * 16 * num_gates
    assert gated.costs(4).kept_by_products - plain.costs(4).kept_by_products == 4 * num_gates + 4 * 16
    tokens = random_tokens().requires_grad_()
    counted = [count_flops(lambda layer=layer: layer(tokens, layout())) for layer in (gated, plain)]
    assert counted[0] - counted[1] == 2 * 4 * 16 * num_gates
    kept = []
    for layer in (gated, plain):
        with kept_bytes(layer) as total:
            layer(tokens, layout())
        kept.append(total[0])
    assert kept[0] - kept[1] == 4 * (4 * num_gates + 4 * 16)


def test_largest_logit_by_hand() -> None:
    # two heads of width 4, scale 1/2. head 0: queries 1..3, keys 2, -1, 9 in the first channel; head 1: keys negative
    # the third position is padding: neither its key 9 nor its query 3 counts. head 0: 2 * 2 / 2 = 2; head 1: 1 * -1 / 2
    query = torch.zeros(1, 2, 3, 4)
    key = torch.zeros(1, 2, 3, 4)
    query[0, 0, :, 0] = torch.tensor([1.0, 2.0, 3.0])
    key[0, 0, :, 0] = torch.tensor([2.0, -1.0, 9.0])
    query[0, 1, :, 0] = torch.tensor([1.0, 2.0, 3.0])
    key[0, 1, :, 0] = torch.tensor([-1.0, -1.0, 9.0])
    padded = Layout((Span(Modality.TEXT, 0, 3),), torch.tensor([[True, True, False]]))
    assert largest_logits(query, key, allowed_keys(padded), padded.valid_BS).tolist() == [2.0, -0.5]
    # causal, with the large key second: only the second query sees it
    key[0, 0, :, 0] = torch.tensor([-1.0, 5.0, 9.0])
    causal = padded._replace(causal=True)
    assert largest_logits(query, key, allowed_keys(causal), padded.valid_BS).tolist() == [5.0, -0.5]
    key[0, 0, :, 0], query[0, 0, :, 0] = torch.tensor([-1.0, 5.0, 9.0]), torch.tensor([8.0, 2.0, 3.0])
    assert largest_logits(query, key, allowed_keys(padded), padded.valid_BS).tolist()[0] == 20.0
    assert largest_logits(query, key, allowed_keys(causal), padded.valid_BS).tolist()[0] == 5.0


def test_logits_are_measured_when_asked_and_change_nothing() -> None:
    layer, tokens = attention(ModelStabilisers(qk_norm=False)), random_tokens()
    silent, asked = layer(tokens, layout()), layer(tokens, layout(), measure=True)
    assert silent.logit_max_H is None and torch.equal(silent.tokens_BSD, asked.tokens_BSD)
    query, key, _ = layer.query_key_value(tokens).unflatten(-1, (3, 4, 4)).unbind(2)
    logits_BHSS = torch.einsum("bqhw,bkhw->bhqk", query, key) / 2  # sqrt(W) of width 4
    torch.testing.assert_close(asked.logit_max_H, logits_BHSS.amax(dim=(0, 2, 3)).detach())
    assert not asked.logit_max_H.requires_grad
    capped = attention(ModelStabilisers(qk_norm=False, logit_cap=0.1))(tokens, layout(), measure=True)
    assert torch.equal(capped.logit_max_H, asked.logit_max_H)  # before the cap


def test_causal_mask_by_hand() -> None:
    # two patches, two words: patches see patches, words see patches and the words up to their own
    allowed = allowed_keys(layout(PAIR, causal=True))
    assert allowed[0, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    # a padded word is seen by itself alone
    padded = allowed_keys(layout(PAIR, num_padding=2, causal=True))
    assert padded[0, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(UserError, match="dim 16 is not a multiple of num_heads 3"):
        Attention(16, 3)
