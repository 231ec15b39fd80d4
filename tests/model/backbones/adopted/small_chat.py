"""Processors of transformers small enough to make in milliseconds, saved to folders as those of models are."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

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
