"""The log-probability of given answers after their prompts, by which a model chooses among them without generating.

    log p(answer | prompt) = sum over its tokens, its end included, of log p(token | all before it)

With the end included these are probabilities of whole answers, so that answers of different lengths can be compared.
Each prompt is encoded once, and answers of one length go on from its cache together: A answers of n tokens after L cost
L + A (n - 1) tokens, not A (L + n).
"""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Chat
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.backbones.past import Past
from lightning_moevlm.model.generation.continue_texts import Logits, check_independent

_MOST_ROWS = 128
"""Sequences that go on together: each has a copy of its prompt's cache."""


@torch.no_grad()
def rate_answers(
    backbone: Backbone,
    logits: Logits,
    images_BRYX: Tensor | None,
    text_BL: Tensor,
    text_mask_BL: Tensor,
    answers: Sequence[Sequence[int]],
) -> Tensor:
    """Return the log-probability of each answer after each prompt, (B, A), fp32, nats.

    Args:
        backbone: in evaluation mode.
        logits: of a head that was trained on next tokens.
        images_BRYX: of each prompt; None for texts alone.
        text_BL: the prompts.
        text_mask_BL: True on real tokens, which come first.
        answers: token ids of each, its end included.

    Raises:
        UserError: an answer that does not fit behind the longest prompt, or a backbone whose tokens depend on later
            ones or on other samples.
    """
    check_independent(backbone)
    longest = int(text_mask_BL.sum(dim=1).max()) + max(map(len, answers))
    if longest > backbone.spec.max_text_len:
        raise UserError(
            f"a question and an answer have {longest} tokens, and data.max_text_len is {backbone.spec.max_text_len}: "
            f"set it to {longest} or more"
        )
    output, past = backbone.prefill(images_BRYX, text_BL, text_mask_BL)
    return _rate(backbone, logits, output.features(Modality.TEXT), past, answers)


@torch.no_grad()
def rate_replies(backbone: Backbone, logits: Logits, chats: Sequence[Chat], replies: Sequence[Sequence[int]]) -> Tensor:
    """Return the log-probability of each reply to each conversation, (B, A), fp32, nats; see `rate_answers`.

    Args:
        chats: beginnings, see `Chat.prompt`.
        replies: token ids of each, its end included.

    Raises:
        UserError: a backbone that knows no conversations, or whose tokens depend on later ones or on other samples.
    """
    check_independent(backbone)
    output, past = backbone.prefill_chats(chats)
    return _rate(backbone, logits, output.tokens_BSD, past, replies)


def _rate(
    backbone: Backbone, logits: Logits, features_BSD: Tensor, past: Past, answers: Sequence[Sequence[int]]
) -> Tensor:
    """Return the log-probability of each answer, (B, A). features_BSD: of the prompts, whose cache is kept."""
    assert past.length_B is not None
    device, num_prompts = past.length_B.device, len(past.length_B)
    row_B = torch.arange(num_prompts, device=device)
    first_BV = logits(features_BSD[row_B, past.length_B - 1]).float().log_softmax(dim=-1)
    rated_BA = torch.empty(num_prompts, len(answers), dtype=torch.float32, device=device)
    for places, answer_CN in _alike(answers, max(1, _MOST_ROWS // num_prompts)):
        token_RN = answer_CN.to(device).repeat(num_prompts, 1)
        row_R = row_B.repeat_interleave(len(places))
        log_prob_R = first_BV[row_R].gather(1, token_RN[:, :1]).squeeze(1)
        if token_RN.shape[1] > 1:
            here = copy.deepcopy(past)
            here.select(row_R)
            for before_R, token_R in zip(token_RN.t(), token_RN.t()[1:], strict=False):
                log_prob_RV = logits(backbone.extend(before_R, here)).float().log_softmax(dim=-1)
                log_prob_R = log_prob_R + log_prob_RV.gather(1, token_R.unsqueeze(1)).squeeze(1)
        rated_BA[:, places] = log_prob_R.view(num_prompts, len(places))
    return rated_BA


def _alike(answers: Sequence[Sequence[int]], most: int) -> Iterator[tuple[list[int], Tensor]]:
    """Yield places of answers of one length, at most so many, with their tokens (C, n)."""
    of_length: dict[int, list[int]] = {}
    for place, answer in enumerate(answers):
        of_length.setdefault(len(answer), []).append(place)
    for alike in of_length.values():
        for start in range(0, len(alike), most):
            places = alike[start : start + most]
            yield places, torch.tensor([list(answers[place]) for place in places])
