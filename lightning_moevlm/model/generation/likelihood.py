"""The log-probability of given answers after their prompts, by which a model chooses among them without generating.

    log p(answer | prompt) = sum over its tokens, its end included, of log p(token | all before it)

With the end included these are probabilities of whole answers, so that answers of different lengths can be compared.
One forward pass over the batch for each answer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Chat, join_chats
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.special_tokens import PAD
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.generation.continue_texts import Logits, check_independent


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
    length_B1 = text_mask_BL.sum(dim=1, keepdim=True)
    longest = int(length_B1.max()) + max(map(len, answers))
    if longest > backbone.spec.max_text_len:
        raise UserError(
            f"a question and an answer have {longest} tokens, and data.max_text_len is {backbone.spec.max_text_len}: "
            f"set it to {longest} or more"
        )
    rated: list[Tensor] = []
    for answer in answers:
        answer_N = torch.tensor(answer, device=text_BL.device)
        place_BN = length_B1 + torch.arange(len(answer), device=text_BL.device)
        room_BN = torch.full_like(place_BN, PAD)
        texts = torch.cat([text_BL, room_BN], dim=1).scatter(1, place_BN, answer_N.expand(place_BN.shape))
        mask = torch.cat([text_mask_BL, room_BN.bool()], dim=1).scatter(1, place_BN, True)
        features_BSD = backbone(images_BRYX, texts, mask, causal=True).features(Modality.TEXT)
        rated.append(_log_prob(logits, features_BSD, place_BN, answer_N))
    return torch.stack(rated, dim=1)


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
    rated: list[Tensor] = []
    for reply in replies:
        joined = join_chats([chat.reply(reply) for chat in chats])
        answer_N = torch.tensor(reply, device=joined.ids_BS.device)
        place_BN = joined.length_B.unsqueeze(1) - len(reply) + torch.arange(len(reply), device=answer_N.device)
        rated.append(_log_prob(logits, backbone.read_chats(joined).tokens_BSD, place_BN, answer_N))
    return torch.stack(rated, dim=1)


def _log_prob(logits: Logits, features_BSD: Tensor, place_BN: Tensor, answer_N: Tensor) -> Tensor:
    """Return the sum over the tokens at these places of the log-probability that the features before them give."""
    features_BND = features_BSD.gather(1, (place_BN - 1).unsqueeze(-1).expand(-1, -1, features_BSD.shape[-1]))
    log_prob_BNV = logits(features_BND.flatten(0, 1)).float().log_softmax(dim=-1).unflatten(0, place_BN.shape)
    index_BN1 = answer_N.expand(place_BN.shape).unsqueeze(-1)
    return log_prob_BNV.gather(2, index_BN1).squeeze(2).sum(dim=1)
