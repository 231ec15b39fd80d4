"""Continues texts token by token after their image: greedy, by sampling, or by beam search.

Every position is computed once; attention keeps the keys and values of those before. Texts of a batch may begin with
different lengths and end at different times. What is generated for a sample does not depend on its neighbours: sampling
draws by the sample's key, and a mixture that limits experts in evaluation is refused.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.batch import Chat
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.special_tokens import EOS, PAD
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.backbones.past import Past
from lightning_moevlm.model.layers import check_causal, find_evaluation_limits
from lightning_moevlm.model.objectives.draws import Draws


@dataclass(frozen=True)
class Decoding:
    """How texts are continued.

    Args:
        method: greedy takes the likeliest token; sample draws one; beam keeps the likeliest beginnings.
        max_new_tokens: [EOS] included.
        num_beams: beginnings that beam search keeps of each text.
        length_penalty: exponent of the length that the log-probability of a beam is divided by; 0 compares sums.
        temperature: of sampling; logits are divided by it.
        top_p: sampling draws from the fewest tokens that together have this probability (arXiv 1904.09751, 3.1).
        seed: of sampling.

    Raises:
        UserError: a number out of range.
    """

    method: Literal["greedy", "sample", "beam"] = "greedy"
    max_new_tokens: int = 20
    num_beams: int = 4
    length_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        check_number("max_new_tokens", self.max_new_tokens, least=1)
        check_number("num_beams", self.num_beams, least=1)
        check_number("temperature", self.temperature, above=0)
        check_number("top_p", self.top_p, above=0, most=1)


class Generated(NamedTuple):
    """Continued texts, without their beginnings."""

    text_BN: Tensor  # int64 token ids; after the end comes padding
    log_prob_B: Tensor  # fp32, nats, sum over the generated tokens, [EOS] included


Logits = Callable[[Tensor], Tensor]
"""Features (M, D) -> logits of the token that follows (M, V)."""


@torch.no_grad()
def generate(
    backbone: Backbone,
    logits: Logits,
    images_BRYX: Tensor | None,
    text_BL: Tensor,
    text_mask_BL: Tensor,
    decoding: Decoding = Decoding(),
    keys: Sequence[str] = (),
) -> Generated:
    """Continue texts until [EOS], max_new_tokens, or the longest text that the backbone embeds.

    Args:
        backbone: in evaluation mode.
        logits: of a head that was trained on next tokens.
        images_BRYX: of each text; None for texts alone.
        text_BL: how the texts begin: [BOS], and a prompt perhaps.
        text_mask_BL: True on real tokens, which come first.
        decoding: how.
        keys: of the samples, which sampling draws by.

    Raises:
        UserError: a backbone whose tokens depend on later ones or on other samples.
    """
    check_independent(backbone)
    output, past = backbone.prefill(images_BRYX, text_BL, text_mask_BL)
    assert past.length_B is not None
    row_B = torch.arange(len(text_BL), device=text_BL.device)
    features_BD = output.features(Modality.TEXT)[row_B, past.length_B - 1]
    room_B = (backbone.spec.max_text_len - past.length_B).clamp(max=decoding.max_new_tokens)
    return _continue(backbone, logits, features_BD, past, room_B, (EOS,), decoding, keys)


@torch.no_grad()
def generate_replies(
    backbone: Backbone,
    logits: Logits,
    chats: Sequence[Chat],
    ends: Sequence[int],
    decoding: Decoding = Decoding(),
    keys: Sequence[str] = (),
) -> Generated:
    """Continue conversations until a token that ends a reply, or max_new_tokens; see `generate`.

    Args:
        chats: beginnings, see `Chat.prompt`.
        ends: ids that end a reply.

    Raises:
        UserError: a backbone that knows no conversations, or whose tokens depend on later ones or on other samples.
    """
    check_independent(backbone)
    output, past = backbone.prefill_chats(chats)
    assert past.length_B is not None
    row_B = torch.arange(len(chats), device=past.length_B.device)
    room_B = torch.full_like(past.length_B, decoding.max_new_tokens)
    features_BD = output.tokens_BSD[row_B, past.length_B - 1]
    return _continue(backbone, logits, features_BD, past, room_B, tuple(ends), decoding, keys)


def check_independent(backbone: Backbone) -> None:
    """Refuse a backbone whose tokens depend on later ones or on other samples.

    Raises:
        UserError: it does.
    """
    check_causal(backbone)
    limited = find_evaluation_limits(backbone)
    if limited:
        raise UserError(
            f"{limited[0]} limits its experts in evaluation, so a text would depend on the others of its batch: set "
            "capacity.eval_factor to null"
        )


def _continue(
    backbone: Backbone,
    logits: Logits,
    features_BD: Tensor,
    past: Past,
    room_B: Tensor,
    ends: tuple[int, ...],
    decoding: Decoding,
    keys: Sequence[str],
) -> Generated:
    """Continue from the features of last tokens. room_B: most new tokens of each. ends: ids after which one stops."""

    def extend(token_B: Tensor) -> Tensor:
        return logits(backbone.extend(token_B, past))

    end_K = torch.tensor(ends, device=room_B.device)
    if decoding.method == "beam":
        return _search(logits(features_BD), extend, past.select, room_B, end_K, decoding)
    draws = Draws(decoding.seed)
    row_B = torch.arange(len(room_B), device=room_B.device)
    chosen: list[Tensor] = []
    log_prob_B = torch.zeros(len(room_B), dtype=torch.float32, device=room_B.device)
    logits_BV = logits(features_BD)
    for step in range(int(room_B.max())):
        going_B = room_B > step
        log_prob_BV = logits_BV.float().log_softmax(dim=-1)
        if decoding.method == "greedy":
            token_B = log_prob_BV.argmax(dim=-1)
        else:
            uniform_B = draws.uniform(f"token {step}", keys, 1).squeeze(1).to(room_B.device)
            token_B = sample_tokens(logits_BV, uniform_B, decoding.temperature, decoding.top_p)
        token_B = torch.where(going_B, token_B, PAD)
        log_prob_B = log_prob_B + torch.where(going_B, log_prob_BV[row_B, token_B], 0.0)
        room_B = torch.where(torch.isin(token_B, end_K), 0, room_B)
        chosen.append(token_B)
        if not bool((room_B > step + 1).any()):
            break
        logits_BV = extend(token_B)
    return Generated(torch.stack(chosen, dim=1), log_prob_B)


def sample_tokens(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draw a token of each row from the nucleus of softmax(logits / temperature).

    Args:
        logits_BV: any.
        uniform_B: in [0, 1); equal numbers draw equal tokens.
        temperature: above 0.
        top_p: the nucleus is the fewest tokens whose probabilities add up to at least this.
    """
    probability_BV, token_BV = (logits_BV.float() / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    before_BV = probability_BV.cumsum(dim=-1) - probability_BV
    kept_BV = torch.where(before_BV < top_p, probability_BV, 0.0)
    bound_BV = kept_BV.cumsum(dim=-1)
    place_B = (bound_BV <= uniform_B.unsqueeze(1) * bound_BV[:, -1:]).sum(dim=-1)
    last_B = (kept_BV > 0).sum(dim=-1) - 1
    return token_BV.gather(1, torch.minimum(place_B, last_B).unsqueeze(1)).squeeze(1)


def _search(
    logits_BV: Tensor,
    extend: Callable[[Tensor], Tensor],
    select: Callable[[Tensor], None],
    room_B: Tensor,
    end_K: Tensor,
    decoding: Decoding,
) -> Generated:
    """Beam search; a finished beam keeps its place and log-probability."""
    num_texts, num_beams = len(logits_BV), decoding.num_beams
    first_B1 = torch.arange(num_texts, device=logits_BV.device).unsqueeze(1) * num_beams
    select(torch.arange(num_texts, device=logits_BV.device).repeat_interleave(num_beams))
    logits_BV = logits_BV.repeat_interleave(num_beams, dim=0)
    score_BK = torch.full((num_texts, num_beams), -torch.inf, dtype=torch.float32, device=logits_BV.device)
    score_BK[:, 0] = 0.0  # all beams are alike at first
    text_RN = torch.empty(num_texts * num_beams, 0, dtype=torch.int64, device=logits_BV.device)
    length_BK = torch.zeros(num_texts, num_beams, dtype=torch.float32, device=logits_BV.device)
    is_done_BK = torch.zeros(num_texts, num_beams, dtype=torch.bool, device=logits_BV.device)
    for step in range(int(room_B.max())):
        is_done_BK = is_done_BK | (room_B <= step).unsqueeze(1)
        log_prob_BKV = logits_BV.float().log_softmax(dim=-1).unflatten(0, (num_texts, num_beams))
        only_padding_V = torch.full_like(log_prob_BKV[0, 0], -torch.inf)
        only_padding_V[PAD] = 0.0
        total_BKV = score_BK.unsqueeze(-1) + torch.where(is_done_BK.unsqueeze(-1), only_padding_V, log_prob_BKV)
        score_BK, place_BK = total_BKV.flatten(1).topk(num_beams, dim=1)
        beam_BK, token_BK = place_BK // total_BKV.shape[-1], place_BK % total_BKV.shape[-1]
        was_done_BK = is_done_BK.gather(1, beam_BK)
        length_BK = length_BK.gather(1, beam_BK) + ~was_done_BK
        is_done_BK = was_done_BK | torch.isin(token_BK, end_K)
        row_R = (first_B1 + beam_BK).flatten()
        text_RN = torch.cat([text_RN[row_R], token_BK.reshape(-1, 1)], dim=1)
        if bool((is_done_BK | (room_B <= step + 1).unsqueeze(1)).all()):
            break
        select(row_R)
        logits_BV = extend(token_BK.flatten())
    best_B1 = (score_BK / length_BK.clamp(min=1) ** decoding.length_penalty).argmax(dim=1, keepdim=True)
    return Generated(text_RN[(first_B1 + best_B1).squeeze(1)], score_BK.gather(1, best_B1).squeeze(1))
