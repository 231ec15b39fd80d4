"""Self-attention shared by all modalities, and the switches that keep its logits small.

    logits = q k^T / sqrt(W),   output = softmax(logits) v W_out

qk-norm: queries and keys pass an RMS norm per head before their product, which bounds the logits
(arXiv 2302.05442, section 2; arXiv 2309.14322, section 3.1).

logit cap: logits become cap * tanh(logits / cap) before the softmax (Gemma 2, arXiv 2408.00118, section 2). The fused
kernels know no cap, and torch's flex_attention has no backward on CPUs, so the cap is written out: it keeps the logits
and two more tensors of shape (B, H, S, S) for the backward pass, where the fused kernel keeps none.

gate: heads' outputs are multiplied by sigmoid(x W_gate) before W_out, x the input of attention: by one number per head,
or by one per head and channel (Qwen, arXiv 2505.06708, whose abstract and equation were read, not its tables). It makes
W_v W_out more than one low-rank map, and lets a head give nothing without attending to a sink token.

sub-norm: a norm between the heads' outputs and W_out (Magneto, arXiv 2210.06423, section 2.2).

The largest logit of a head is the early warning of divergence (arXiv 2309.14322, section 3.1) and what QK-clip acts on.
It is computed with `measure`, returned beside the tokens, and stored nowhere.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.model_card import Costs
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.sequence_layout import Layout
from lightning_moevlm.model.initial_weights import Module
from lightning_moevlm.model.layers.norms import NormKind, make_norm, normalise
from lightning_moevlm.model.layers.stabilisers import ModelStabilisers
from lightning_moevlm.model.precision import PrecisionPolicy, region

_QK_NORM: NormKind = "rms"


class AttentionOutput(NamedTuple):
    """The result of attention.

    tokens_BSD: same shape as the input.
    logit_max_H: fp32, the largest logit of each head before any cap; None without `measure`.

    Logits of padding, and those that a mask forbids, do not count; the maximum carries no gradient.
    """

    tokens_BSD: Tensor
    logit_max_H: Tensor | None


class KeyValues:
    """Keeps keys and values of one attention, so that a sequence grows without computing its past anew.

    key_BHSW, value_BHSW: as attention takes them; None before the first position.
    """

    def __init__(self) -> None:
        self.key_BHSW: Tensor | None = None
        self.value_BHSW: Tensor | None = None

    def extend(self, key_BHNW: Tensor, value_BHNW: Tensor) -> tuple[Tensor, Tensor]:
        """Add N positions and return all of them."""
        if self.key_BHSW is not None and self.value_BHSW is not None:
            key_BHNW = torch.cat([self.key_BHSW, key_BHNW], dim=2)
            value_BHNW = torch.cat([self.value_BHSW, value_BHNW], dim=2)
        self.key_BHSW, self.value_BHSW = key_BHNW, value_BHNW
        return key_BHNW, value_BHNW

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order; one may be kept several times."""
        assert self.key_BHSW is not None and self.value_BHSW is not None
        self.key_BHSW, self.value_BHSW = self.key_BHSW[rows], self.value_BHSW[rows]


class Attention(Module):
    """Multi-head attention; padding is not attended to.

    Args:
        dim: model width D.
        num_heads: H; must divide D.
        stabilisers: `qk_norm`, `logit_cap`, `attention_gate` and `sub_norm` (of kind `norm`) act here.
    """

    precision = PrecisionPolicy()

    def __init__(self, dim: int, num_heads: int, stabilisers: ModelStabilisers = ModelStabilisers()) -> None:
        super().__init__()
        check_number("num_heads", num_heads, least=1)
        if dim % num_heads:
            raise UserError(f"dim {dim} is not a multiple of num_heads {num_heads}: change one of them")
        self.dim = dim
        self.num_heads = num_heads
        self.logit_cap = stabilisers.logit_cap
        self.query_key_value = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        gates = {None: 0, "head": num_heads, "element": dim}[stabilisers.attention_gate]
        self.gate = nn.Linear(dim, gates, bias=False) if gates else None
        width = dim // num_heads
        self.query_norm = make_norm(_QK_NORM, width) if stabilisers.qk_norm else None
        self.key_norm = make_norm(_QK_NORM, width) if stabilisers.qk_norm else None
        self.out_norm = make_norm(stabilisers.norm, dim) if stabilisers.sub_norm else None
        self.path = ""  # in the backbone, see name_layers

    def forward(
        self,
        tokens_BSD: Tensor,
        layout: Layout,
        measure: bool = False,
        past: KeyValues | None = None,
        allowed: Tensor | None = None,
    ) -> AttentionOutput:
        """Attend.

        Args:
            tokens_BSD: all positions of the layout; with `past`, the last ones alone.
            layout: of the whole sequence.
            measure: also return the largest logit of each head, which computes all logits once more.
            past: of the positions before; it is extended.
            allowed: `allowed_keys` of the layout, where several layers share them; None computes them.
        """
        query, key, value = self.query_key_value(tokens_BSD).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        query_BHSW = normalise(query, self.query_norm, self.precision).transpose(1, 2)
        key_BHSW = normalise(key, self.key_norm, self.precision).transpose(1, 2)
        allowed = allowed_keys(layout) if allowed is None else allowed
        if past is not None and allowed.shape[2] > 1:
            allowed = allowed[:, :, -tokens_BSD.shape[1] :]
        with region(self.precision, "attention_logits", tokens_BSD.device.type) as cast:
            query_BHSW, key_BHSW, value_BHSW = cast(query_BHSW), cast(key_BHSW), cast(value.transpose(1, 2))
            if past is not None:
                key_BHSW, value_BHSW = past.extend(key_BHSW, value_BHSW)
            if self.logit_cap is None:
                attended_BHSW = F.scaled_dot_product_attention(query_BHSW, key_BHSW, value_BHSW, attn_mask=allowed)
            else:
                attended_BHSW = attend_with_cap(query_BHSW, key_BHSW, value_BHSW, allowed, self.logit_cap)
        logit_max_H = (
            largest_logits(query_BHSW, key_BHSW, allowed, layout.valid_BS) if measure and past is None else None
        )
        heads_BSHW = attended_BHSW.to(value.dtype).transpose(1, 2)
        if self.gate is not None:
            gate_BSD = torch.sigmoid(self.gate(tokens_BSD))
            heads_BSHW = heads_BSHW * gate_BSD.unflatten(-1, (self.num_heads, -1))
        heads_BSD = heads_BSHW.flatten(2)
        return AttentionOutput(self.out(normalise(heads_BSD, self.out_norm, self.precision)), logit_max_H)

    def costs(self, num_tokens: int) -> Costs:
        """8 S D^2 FLOPs for the projections and 4 S^2 D for scores and values, for one sequence of S tokens.

        A gate takes 2 S D per number that it gives: H, or D.

        Kept of each token: the input, query, key and value, the heads' outputs and its row of the mask; with qk-norm
        queries and keys before and after the scale, with sub-norm its input; with a gate its numbers and
        the gated outputs; with a logit cap three tensors (H, S, S).
        """
        values = num_tokens * self.dim
        has_qk_norm, has_out_norm = self.query_norm is not None, self.out_norm is not None
        gates = 0 if self.gate is None else self.gate.out_features
        maps = 1 if self.logit_cap is None else 3 * self.num_heads
        return Costs(
            attention=8.0 * values * self.dim + 4.0 * values * num_tokens + 2.0 * values * gates,
            kept_by_norms=float(values * (2 * has_qk_norm + has_out_norm)),
            kept_by_products=float(
                values * (5 + 2 * has_qk_norm + bool(gates)) + gates * num_tokens + maps * num_tokens**2
            ),
        )


def joined_matrices(model: nn.Module) -> dict[str, int]:
    """Return the parameters that join matrices of heads, by full name, and how many: 3 H, one below the other."""
    return {
        f"{path}.query_key_value.weight".lstrip("."): 3 * module.num_heads
        for path, module in model.named_modules()
        if isinstance(module, Attention)
    }


def allowed_keys(layout: Layout) -> Tensor:
    """Return a bool mask, True where the query of the third axis may see the key of the fourth.

    Bidirectional: every real position, (B, 1, 1, S). Causal: patches see patches, text sees patches and no later text,
    (B, 1, S, S). Separate: each modality sees itself alone, (B, 1, S, S). Each position of the last two sees itself, so
    that a row of padding is not a softmax over nothing.
    """
    valid_B11S = layout.valid_BS[:, None, None, :]
    is_separate = layout.separate and len(layout.spans) > 1
    if not (layout.causal or is_separate):
        return valid_B11S
    modality_S = layout.modality_S
    position_S = torch.arange(modality_S.shape[0], device=modality_S.device)
    seen_SS = torch.ones((), dtype=torch.bool, device=modality_S.device)
    if layout.causal:
        is_text_S = modality_S == int(Modality.TEXT)
        is_earlier_SS = position_S.unsqueeze(0) <= position_S.unsqueeze(1)
        seen_SS = seen_SS & (~is_text_S.unsqueeze(0) | (is_text_S.unsqueeze(1) & is_earlier_SS))
    if is_separate:
        seen_SS = seen_SS & (modality_S.unsqueeze(0) == modality_S.unsqueeze(1))
    return (valid_B11S & seen_SS) | (position_S.unsqueeze(0) == position_S.unsqueeze(1))


def attend_with_cap(
    query_BHSW: Tensor, key_BHSW: Tensor, value_BHSW: Tensor, allowed: Tensor, logit_cap: float
) -> Tensor:
    """Return softmax(cap * tanh(q k^T / sqrt(W) / cap)) v; cap and softmax in fp32, products in the inputs' dtype."""
    logits_BHSS = (query_BHSW @ key_BHSW.transpose(-2, -1)).to(torch.float32) / query_BHSW.shape[-1] ** 0.5
    capped_BHSS = logit_cap * torch.tanh(logits_BHSS / logit_cap)
    probs_BHSS = capped_BHSS.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
    return probs_BHSS.to(value_BHSW.dtype) @ value_BHSW


@torch.no_grad()
def largest_logits(query_BHSW: Tensor, key_BHSW: Tensor, allowed: Tensor, valid_BS: Tensor) -> Tensor:
    """Return the largest q k^T / sqrt(W) of each head over real queries and the keys that they see, fp32 (H).

    One head at a time, so that the memory is that of (B, S, S).
    """
    seen_BSS = allowed[:, 0] & valid_BS.unsqueeze(-1)
    heads = zip(query_BHSW.detach().unbind(1), key_BHSW.detach().unbind(1), strict=True)
    largest = [(query @ key.transpose(-2, -1)).masked_fill(~seen_BSS, -torch.inf).amax() for query, key in heads]
    return torch.stack(largest).to(torch.float32) / query_BHSW.shape[-1] ** 0.5
