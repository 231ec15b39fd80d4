"""Processors of transformers small enough to make in milliseconds, saved to folders as those of models are."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from lightning_moevlm.contracts.batch import Batch, Chat
from lightning_moevlm.data.text.chat import ChatMaker, Turn
from lightning_moevlm.model.backbones import HuggingFaceModel
from tests.model.backbones.adopted.small_hugging_face import LLAVA, QWEN

SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>", "<image>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
IM_END, IMAGE, IMAGE_PAD = 2, 3, 5
"""Ids of some of them."""

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}PLACEHOLDER"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML, as Qwen's."""

QWEN_CHAT: dict[str, Any] = QWEN | {
    "image_token_id": IMAGE_PAD, "vision_start_token_id": 4, "vision_end_token_id": 6, "video_token_id": 299,
}  # fmt: skip
LLAVA_CHAT: dict[str, Any] = LLAVA | {"image_token_id": IMAGE}


def save_tokenizer(folder: Path, placeholder: str = "") -> Any:
    """Save a tokenizer of bytes with a chat template, and return it."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL) + 256,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<pad>",
        chat_template=TEMPLATE.replace("PLACEHOLDER", placeholder),
    )  # fmt: skip
    made.save_pretrained(folder)
    return made


def save_llava(folder: Path) -> Path:
    """Save the processor of `LLAVA_CHAT`: every image becomes 16 px and 4 tokens."""
    from transformers import LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    tokenizer = save_tokenizer(folder, "<image>")
    images = LlavaImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)
    LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def qwen_processor(folder: Path) -> Any:
    """Return the processor of `QWEN_CHAT`: images of 16 to 32 px a side, a token for each 8 px.

    Its part for videos, which is not used, needs torchvision; here it is empty.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    class WithoutVideos(Qwen3VLProcessor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
            """Accept that there is no processor of videos."""

    tokenizer = save_tokenizer(folder, "<|vision_start|><|image_pad|><|vision_end|>")
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 32 * 32}
    )
    return WithoutVideos(images, tokenizer, None, chat_template=tokenizer.chat_template)


TURNS = [
    [Turn("what is it?", "a cat")],
    [Turn("how many?", "two"), Turn("sure?", "yes")],
    [Turn("colour?", "red")],
]


def picture(number: int, height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PICTURES = [picture(0, 20, 30), picture(1, 16, 16), picture(2, 40, 20)]


def make_chats(maker: ChatMaker, num_turns: int = 2) -> list[Chat]:
    return [maker.make([image], turns[:num_turns])[0] for image, turns in zip(PICTURES, TURNS, strict=True)]


def messages_of(turns: list[Turn]) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = []
    for number, turn in enumerate(turns):
        images = [{"type": "image"}] if number == 0 else []
        said.append({"role": "user", "content": [*images, {"type": "text", "text": turn.question}]})
        said.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return said


def batch_of(chats: list[Chat]) -> Batch:
    """The pairs that go with conversations, whose own images and texts no model reads."""
    text_BL = torch.full((len(chats), 4), 7)
    images_BRYX = torch.zeros(len(chats), 3, 16, 16, dtype=torch.uint8)
    keys = tuple(f"sample{number}" for number in range(len(chats)))
    return Batch(images_BRYX, text_BL, torch.ones_like(text_BL).bool(), keys, chats=tuple(chats))


def plain_model(model: HuggingFaceModel) -> Any:
    """The same model without our layers."""
    plain = type(model.model)._from_config(model.config).eval()
    plain.load_state_dict(
        {name.replace(".router.theirs", ""): value for name, value in model.model.state_dict().items()}
    )
    return plain
