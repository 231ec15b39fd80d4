"""Attention sees every real position and no padding."""

import pytest
import torch

from lightning_moevlm.errors import UserError
from lightning_moevlm.layers import Attention, initialise
from lightning_moevlm.plans import Modality
from lightning_moevlm.records import Layout, Span


def attention(qk_norm: bool) -> Attention:
    layer = Attention(16, 4, qk_norm)
    initialise(layer, seed=0, std=0.3)
    return layer


@pytest.mark.parametrize("qk_norm", [True, False])
def test_padding_is_not_attended_to(qk_norm: bool) -> None:
    valid_BS = torch.tensor([[True, True, True, False]])
    layout = Layout((Span(Modality.TEXT, 0, 4),), valid_BS)
    tokens = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[:, 3] = 50.0
    layer = attention(qk_norm)
    torch.testing.assert_close(layer(tokens, layout)[:, :3], layer(other, layout)[:, :3])
    other[:, 2] = 50.0
    assert not torch.allclose(layer(tokens, layout)[:, :2], layer(other, layout)[:, :2])


def test_qk_norm_makes_attention_blind_to_the_scale_of_its_input() -> None:
    layout = Layout((Span(Modality.TEXT, 0, 4),), torch.ones(1, 4, dtype=torch.bool))
    tokens = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))
    normed, plain = attention(True), attention(False)
    torch.testing.assert_close(normed(tokens * 10, layout), normed(tokens, layout) * 10, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain(tokens * 10, layout), plain(tokens, layout) * 10, rtol=1e-2, atol=1e-2)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(UserError, match="dim 16 is no multiple of num_heads 3"):
        Attention(16, 3, True)
