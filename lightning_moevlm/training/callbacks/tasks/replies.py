"""Asks a model about held-out samples, by generating or by choosing among given answers.

Samples are prompted as in training: by the beginnings of their texts, or of their conversations (`data.chat`).
"""

from collections.abc import Sequence
from functools import partial

from lightning.pytorch import Trainer

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.special_tokens import EOS
from lightning_moevlm.model.generation import Decoding, generate, generate_replies, rate_answers, rate_replies
from lightning_moevlm.model.objectives import NextToken
from lightning_moevlm.training.callbacks.tasks.parts import find_data
from lightning_moevlm.training.vision_language_module import VisionLanguageModule


def generate_texts(
    trainer: Trainer, module: VisionLanguageModule, objective: NextToken, asked: Batch, decoding: Decoding, caller: str
) -> tuple[str, ...]:
    """Return what the model says to each text of a batch of pairs, or of texts alone. caller: for messages."""
    data, backbone = find_data(trainer, caller), module.backbone
    logits = partial(objective.logits, backbone)
    with trainer.precision_plugin.val_step_context():
        if asked.chats is not None and data.chats is not None:
            prompts = [chat.prompt() for chat in asked.chats]
            replied = generate_replies(backbone, logits, prompts, data.chats.ends, decoding, asked.text_keys)
            return tuple(data.chats.decode(ids) for ids in replied.text_BN.tolist())
        assert asked.text_BL is not None and asked.text_mask_BL is not None
        prompt = objective.prompts(asked.text_BL, asked.text_mask_BL)
        found = generate(backbone, logits, asked.images_BRYX, *prompt, decoding, asked.text_keys)
    return tuple(data.tokenizer.decode(ids).strip() for ids in found.text_BN.tolist())


def choose_texts(
    trainer: Trainer,
    module: VisionLanguageModule,
    objective: NextToken,
    asked: Batch,
    among: Sequence[str],
    caller: str,
) -> tuple[str, ...]:
    """Return the likeliest of some answers to each text of a batch of pairs, or of texts alone."""
    data, backbone = find_data(trainer, caller), module.backbone
    logits = partial(objective.logits, backbone)
    with trainer.precision_plugin.val_step_context():
        if asked.chats is not None and data.chats is not None:
            prompts = [chat.prompt() for chat in asked.chats]
            rated_BA = rate_replies(backbone, logits, prompts, [data.chats.encode_answer(each) for each in among])
        else:
            assert asked.text_BL is not None and asked.text_mask_BL is not None
            prompt_BL, mask_BL = objective.prompts(asked.text_BL, asked.text_mask_BL)
            longest = int(mask_BL.sum(dim=1).max())  # so that answers have the room that padding takes
            answers = [[*data.tokenizer.ids(each), EOS] for each in among]
            rated_BA = rate_answers(
                backbone, logits, asked.images_BRYX, prompt_BL[:, :longest], mask_BL[:, :longest], answers
            )
    return tuple(among[place] for place in rated_BA.argmax(dim=1).tolist())
