"""Logits of every generated position, beside those of `generate` of the unmodified model.

They are equal to the bit where both run the same rows together: one prompt, or several of one length. Prompts of
several lengths are padded on the left there and run length by length here, but for the head, which takes all of them:
sums then differ in order, and in the last bits.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'lightning-moevlm[hf]'")

from lightning_moevlm.contracts.batch import Chat
from lightning_moevlm.contracts.special_tokens import EOS
from lightning_moevlm.data.text.chat import ChatMaker, ChatOptions
from lightning_moevlm.model.backbones import HuggingFaceModel
from lightning_moevlm.model.backbones.adopted.build import DType, ExpertsBackend, takes
from lightning_moevlm.model.generation import Decoding, generate, generate_replies
from lightning_moevlm.model.objectives import NextToken
from lightning_moevlm.model.routers import TopKRouter
from tests.model.backbones.adopted.small_chat import (
    LLAVA_CHAT,
    PICTURES,
    QWEN_CHAT,
    TURNS,
    messages_of,
    plain_model,
    qwen_processor,
    save_llava,
)
from tests.model.backbones.adopted.small_hugging_face import DEEPSEEK, LLAVA, OLMOE, QWEN, TEXT, small_hugging_face
from tests.model.backbones.adopted.test_generation import BATCH, LINEAR, SLIDING

NEW = 5
"""Generated tokens."""

_TOWER = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
          "spatial_merge_size": 2}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
HYBRID: dict[str, Any] = {
    "model_type": "qwen3_5_moe",
    "text_config": TEXT | {key: value for key, value in LINEAR.items() if "linear" in key or key == "layer_types"}
    | {"shared_expert_intermediate_size": 16},
    "vision_config": _TOWER | {"out_hidden_size": 32, "temporal_patch_size": 2, "num_position_embeddings": 16},
}  # fmt: skip
"""Linear attention behind images."""
GLM: dict[str, Any] = {
    "model_type": "glm4v_moe",
    "text_config": TEXT | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
                           "first_k_dense_replace": 1,
                           "rope_parameters": _ROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}},
    "vision_config": _TOWER | {"out_hidden_size": 32, "temporal_patch_size": 2, "image_size": 16},
}  # fmt: skip
"""A bias and groups behind images."""
ERNIE: dict[str, Any] = {
    "model_type": "ernie4_5_vl_moe",
    "text_config": TEXT | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1,
                           "moe_intermediate_size": [16, 8], "mlp_layer_types": ["sparse", "sparse"],
                           "rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]}},
    "vision_config": _TOWER | {"in_channels": 3},
}  # fmt: skip
"""Experts of one modality."""
ROUNDING: dict[DType, float] = {"float32": 1e-6, "bfloat16": 2e-2}
"""Of logits below 1."""

WAYS = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
BACKENDS = pytest.mark.parametrize("backend", ["eager", "grouped_mm"])


def both(config: dict[str, Any], backend: ExpertsBackend, dtype: DType) -> tuple[HuggingFaceModel, Any]:
    """Return a model with our layers, and the same of transformers alone; balancing biases are not 0."""
    model = small_hugging_face(config, experts_backend=backend, dtype=dtype).eval()
    for name, buffer in model.model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.tensor([0.1, -0.2, 0.05, 0.0]))
    return model, plain_model(model)


class Heard:
    """The head of a model, which keeps what our generation asks it at each step."""

    def __init__(self, model: HuggingFaceModel) -> None:
        self._logits = partial(NextToken(model.spec).logits, model)
        self._features: list[Tensor] = []
        self._answers: list[Tensor] = []

    def __call__(self, features_MD: Tensor) -> Tensor:
        self._features.append(features_MD)
        self._answers.append(self._logits(features_MD))
        return self._answers[-1]

    def logits_BNV(self) -> Tensor:
        """Return its answers in fp32, as `generate` of transformers does."""
        return torch.stack(self._answers, dim=1).float()

    def alone(self, rows: list[int]) -> Tensor:
        """Return its answers to some rows without the others."""
        return torch.stack([self._logits(each[rows]) for each in self._features], dim=1).float()


def theirs(plain: Any, ids_BS: Tensor, valid_BS: Tensor, end: int = EOS, **images: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens (B, N) and logits (B, N, V) that transformers generates."""
    made = plain.generate(
        ids_BS, attention_mask=valid_BS.long(), **images, max_new_tokens=NEW, do_sample=False, eos_token_id=end,
        pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return made.sequences[:, ids_BS.shape[1] :], torch.stack(made.logits, dim=1)


def texts(model: HuggingFaceModel, rows: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, Heard]:
    """Let our generation continue the beginnings of some rows, padded on the right."""
    assert BATCH.text_BL is not None and BATCH.images_BRYX is not None
    text_BL = BATCH.text_BL[list(rows), : max(lengths)]
    mask_BL = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    heard = Heard(model)
    images_BRYX = None if model.images is None else BATCH.images_BRYX[list(rows)]
    found = generate(model, heard, images_BRYX, text_BL, mask_BL, Decoding(max_new_tokens=NEW))
    return found.text_BN, heard


def their_texts(
    model: HuggingFaceModel, plain: Any, rows: Sequence[int], lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Let transformers continue the same, padded on the left."""
    assert BATCH.text_BL is not None and BATCH.images_BRYX is not None
    images: dict[str, Tensor] = {}
    image_P = torch.empty(0, dtype=torch.int64)
    if model.images is not None:
        images = model.images(BATCH.images_BRYX[list(rows)], plain.dtype)
        image_P = torch.full((model.spec.num_patches,), model.config.image_token_id)
    texts = [torch.cat([image_P, BATCH.text_BL[row, :length]]) for row, length in zip(rows, lengths, strict=True)]
    ids_BS, valid_BS = pad_left(texts)
    for name in ("mm_token_type_ids", "moe_mm_token_type_ids"):
        if images and takes(plain.model.forward, name):
            images[name] = (ids_BS == model.config.image_token_id).long()
    return theirs(plain, ids_BS, valid_BS, **images)


def pad_left(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, texts))
    ids = [torch.cat([text.new_zeros(longest - len(text)), text]) for text in texts]
    valid = [torch.arange(longest) >= longest - len(text) for text in texts]
    return torch.stack(ids), torch.stack(valid)


def assert_same(found: tuple[Tensor, Heard], expected: tuple[Tensor, Tensor]) -> None:
    (tokens_BN, heard), (their_tokens_BN, logits_BNV) = found, expected
    assert torch.equal(tokens_BN, their_tokens_BN)
    assert torch.equal(heard.logits_BNV(), logits_BNV)


@BACKENDS
@WAYS
@pytest.mark.parametrize(
    "config",
    [OLMOE, DEEPSEEK, SLIDING, LINEAR, QWEN, LLAVA, HYBRID, GLM, ERNIE],
    ids=lambda config: config["model_type"],
)
def test_every_generated_position_has_the_logits_of_the_unmodified_model(
    config: dict[str, Any], dtype: DType, backend: ExpertsBackend
) -> None:
    model, plain = both(config, backend, dtype)
    assert model.layers[0].dispatcher.record().startswith(f"transformers, {backend}")
    for rows in ([1], range(4)):  # one prompt; several of one length
        lengths = [3] * len(rows)
        found = texts(model, rows, lengths)
        assert found[0].shape == (len(rows), NEW)
        assert_same(found, their_texts(model, plain, rows, lengths))
    lengths = [3, 2, 3, 2]  # the features of each length to the bit, the padded batch to rounding
    tokens_BN, heard = texts(model, range(4), lengths)
    for group in ([0, 2], [1, 3]):
        their_tokens_BN, alone_BNV = their_texts(model, plain, group, [lengths[row] for row in group])
        assert torch.equal(tokens_BN[group], their_tokens_BN)
        assert torch.equal(heard.alone(group), alone_BNV)
    _, padded_BNV = their_texts(model, plain, range(4), lengths)
    torch.testing.assert_close(heard.logits_BNV()[:, 0], padded_BNV[:, 0], rtol=0, atol=ROUNDING[dtype])


def test_routers_of_ours_with_their_weights_generate_the_same_bits() -> None:
    _, plain = both(OLMOE, "eager", "float32")
    model = small_hugging_face(OLMOE, experts_backend="eager", router=partial(TopKRouter, top_k=2)).eval()
    assert model.layers[0].dispatcher.record().endswith("TopKRouter with the model's weights")
    assert_same(texts(model, range(4), [3] * 4), their_texts(model, plain, range(4), [3] * 4))


@pytest.mark.parametrize("config", [QWEN, LLAVA], ids=lambda config: config["model_type"])
def test_a_model_that_says_the_id_of_images_goes_on_as_the_unmodified_one(config: dict[str, Any]) -> None:
    model, _ = both(config, "eager", "float32")
    tokens_BN, heard = texts(model, [0], [3])
    assert float(heard.logits_BNV()[0, 0].max()) > 0
    head, image = model.text_embedding_VD, model.config.image_token_id
    with torch.no_grad():
        head[image] = 10 * head[tokens_BN[0, 0]]
    plain = plain_model(model)
    found = texts(model, range(4), [3] * 4)
    assert int(found[0][0, 0]) == image
    assert_same(found, their_texts(model, plain, range(4), [3] * 4))


def replies(model: HuggingFaceModel, chats: Sequence[Chat], end: int) -> tuple[Tensor, Heard]:
    heard = Heard(model)
    return generate_replies(model, heard, chats, (end,), Decoding(max_new_tokens=NEW)).text_BN, heard


@pytest.fixture(scope="module")
def makers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatMaker]:
    folder = tmp_path_factory.mktemp("qwen")
    qwen = ChatMaker(ChatOptions(str(folder)))
    qwen.__dict__["processor"] = qwen_processor(folder)  # AutoProcessor needs torchvision for videos
    llava: Path = save_llava(tmp_path_factory.mktemp("llava"))
    return {"qwen3_vl_moe": qwen, "llava": ChatMaker(ChatOptions(str(llava)))}


@BACKENDS
@WAYS
@pytest.mark.parametrize("config", [QWEN_CHAT, LLAVA_CHAT], ids=lambda config: config["model_type"])
def test_replies_have_the_logits_of_the_unmodified_model(
    config: dict[str, Any], dtype: DType, backend: ExpertsBackend, makers: dict[str, ChatMaker]
) -> None:
    """Images of three sizes; one reply ends before the others."""
    maker, (model, plain) = makers[config["model_type"]], both(config, backend, dtype)
    asked = [
        maker.processor.apply_chat_template(messages_of(turns)[:1], add_generation_prompt=True, tokenize=False)
        for turns in TURNS
    ]
    prompts = [maker.make([image], turns[:1])[0].prompt() for image, turns in zip(PICTURES, TURNS, strict=True)]

    def whole(rows: Sequence[int], end: int) -> tuple[Tensor, Tensor]:
        inputs = maker.processor(
            text=[asked[row] for row in rows], images=[PICTURES[row] for row in rows], padding=True,
            padding_side="left", return_tensors="pt",
        )  # fmt: skip
        inputs["pixel_values"] = inputs["pixel_values"].to(plain.dtype)
        return theirs(plain, inputs.pop("input_ids"), inputs.pop("attention_mask"), end, **inputs)

    end = int(whole([0], -1)[0][0, 1])  # the second token of the first reply
    for row, prompt in enumerate(prompts):
        found = replies(model, [prompt], end)
        assert found[0].shape[1] == 2 if row == 0 else NEW
        assert_same(found, whole([row], end))
    assert_same(replies(model, [prompts[1]] * 2, end), whole([1, 1], end))
    _, heard = replies(model, prompts, end)
    _, padded_BNV = whole(range(3), end)  # on the left
    torch.testing.assert_close(heard.logits_BNV()[:, 0], padded_BNV[:, 0], rtol=0, atol=ROUNDING[dtype])
