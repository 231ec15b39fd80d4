"""Generation with the caches of transformers: what plain transformers generates, and what whole passes give."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'lightning-moevlm[hf]'")

from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.special_tokens import PAD
from lightning_moevlm.model.backbones import HuggingFaceModel
from lightning_moevlm.model.backbones.adopted.build import Origin, build
from lightning_moevlm.model.backbones.backbone import BackboneOutput
from lightning_moevlm.model.backbones.past import Past
from lightning_moevlm.model.generation import Decoding, generate
from lightning_moevlm.model.objectives import NextToken
from lightning_moevlm.model.routers import TopKRouter
from tests.model.backbones.adopted.small_hugging_face import DEEPSEEK, LLAVA, OLMOE, QWEN, small_hugging_face
from tests.small_model import pair_batch

BATCH = pair_batch()
SLIDING = {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 32,
           "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
           "head_dim": 8, "sliding_window": 4, "max_position_embeddings": 128, "pad_token_id": 0}  # fmt: skip
LINEAR = {"model_type": "qwen3_next", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
          "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "linear_key_head_dim": 8,
          "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
          "layer_types": ["linear_attention", "full_attention"], "max_position_embeddings": 128}  # fmt: skip


class Whole(Past):
    """The reference: texts so far, all of which run again for each token."""

    def __init__(self, images_BRYX: Tensor | None, text_BL: Tensor, text_mask_BL: Tensor) -> None:
        super().__init__([])
        self.images_BRYX, self.text_BL, self.text_mask_BL = images_BRYX, text_BL, text_mask_BL
        self.length_B = text_mask_BL.sum(dim=1)

    def append(self, text_B: Tensor) -> None:
        """Write one real token after each text."""
        assert self.length_B is not None
        if int(self.length_B.max()) == self.text_BL.shape[1]:
            column_B1 = torch.zeros_like(self.text_BL[:, :1])
            self.text_BL = torch.cat([self.text_BL, column_B1 + PAD], dim=1)
            self.text_mask_BL = torch.cat([self.text_mask_BL, column_B1.bool()], dim=1)
        place_B1 = self.length_B.unsqueeze(1)
        self.text_BL = self.text_BL.scatter(1, place_B1, text_B.unsqueeze(1))
        self.text_mask_BL = self.text_mask_BL.scatter(1, place_B1, True)
        self.length_B = self.length_B + 1

    def select(self, rows: Tensor) -> None:
        """Keep these texts, in this order; one may be kept several times."""
        assert self.length_B is not None
        self.text_BL, self.text_mask_BL = self.text_BL[rows], self.text_mask_BL[rows]
        self.images_BRYX = None if self.images_BRYX is None else self.images_BRYX[rows]
        self.length_B = self.length_B[rows]


def continued(model: HuggingFaceModel, with_images: bool, decoding: Decoding, uneven: bool = True) -> Tensor:
    assert BATCH.text_BL is not None
    begin_BL = BATCH.text_BL[:, :3]
    mask_BL = torch.ones_like(begin_BL, dtype=torch.bool)
    mask_BL[1, 2:] = not uneven  # a shorter beginning among the others
    logits = partial(NextToken(model.spec).logits, model)
    images = BATCH.images_BRYX if with_images else None
    return generate(model, logits, images, begin_BL, mask_BL, decoding, keys=BATCH.keys).text_BN


def again(model: HuggingFaceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a model run whole texts for each token."""

    def prefill(images_BRYX: Tensor | None, text_BL: Tensor, text_mask_BL: Tensor) -> tuple[BackboneOutput, Past]:
        return model(images_BRYX, text_BL, text_mask_BL), Whole(images_BRYX, text_BL, text_mask_BL)

    def extend(text_B: Tensor, past: Whole) -> Tensor:
        if model.images is not None:
            text_B = torch.where(text_B == model.config.image_token_id, PAD, text_B)
        past.append(text_B)
        output = model(past.images_BRYX, past.text_BL, past.text_mask_BL)
        assert past.length_B is not None
        return output.features(Modality.TEXT)[torch.arange(len(text_B)), past.length_B - 1]

    monkeypatch.setattr(model, "prefill", prefill)
    monkeypatch.setattr(model, "extend", extend)


@pytest.mark.parametrize("config", [QWEN, LLAVA, OLMOE, DEEPSEEK], ids=lambda config: config["model_type"])
def test_greedy_texts_are_those_of_plain_transformers(config: dict[str, Any]) -> None:
    model = small_hugging_face(config).eval()
    sees = model.images is not None
    found = continued(model, sees, Decoding(max_new_tokens=5))
    plain: Any = build(Origin(None, config, "float32", None, None, True, 300)).eval()
    plain.load_state_dict({k.replace(".router.theirs", ""): v for k, v in model.model.state_dict().items()})
    assert BATCH.text_BL is not None and BATCH.images_BRYX is not None
    for row in range(4):
        ids = BATCH.text_BL[row : row + 1, : 2 if row == 1 else 3]
        inputs: dict[str, Tensor] = {}
        if sees:
            assert model.images is not None
            inputs = model.images(BATCH.images_BRYX[row : row + 1], torch.float32)
            ids = torch.cat([torch.full((1, 4), model.config.image_token_id), ids], dim=1)
        if config is QWEN:
            inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
        made = plain.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=3,
            pad_token_id=0,
            **inputs,
        )[0, ids.shape[1] :]
        assert found[row, : len(made)].tolist() == made.tolist()


@pytest.mark.parametrize("method", ["greedy", "sample", "beam"])
@pytest.mark.parametrize(
    "make",
    [
        partial(small_hugging_face, QWEN), partial(small_hugging_face, OLMOE, router=partial(TopKRouter, top_k=2)),
        partial(small_hugging_face, SLIDING), partial(small_hugging_face, LINEAR),
    ],
    ids=["images", "our router", "sliding window", "linear attention"],
)  # fmt: skip
def test_caches_give_what_whole_passes_give(
    make: Callable[[], HuggingFaceModel], method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make().eval()
    decoding = Decoding(method=method, max_new_tokens=4, num_beams=3)
    lengths: list[int] = []
    body = getattr(model.model, model.model.base_model_prefix)
    hook = body.register_forward_pre_hook(
        lambda module, args, named: lengths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    cached = continued(model, model.images is not None, decoding)
    hook.remove()
    assert set(lengths[2:]) == {1}  # after two beginnings of different lengths
    again(model, monkeypatch)
    assert torch.equal(cached, continued(model, model.images is not None, decoding))


def test_texts_after_pairs_do_not_take_their_positions() -> None:
    """Models with positions of images keep an offset between passes."""
    model = small_hugging_face(QWEN).eval()
    first = continued(model, False, Decoding(max_new_tokens=4))
    continued(model, True, Decoding(max_new_tokens=4))
    assert torch.equal(continued(model, False, Decoding(max_new_tokens=4)), first)


def test_a_beginning_is_encoded_as_a_forward_pass_encodes_it() -> None:
    model = small_hugging_face(QWEN).eval()
    whole = model(*BATCH[:3])
    output, _ = model.prefill(*BATCH[:3])
    assert output.layout.spans == whole.layout.spans
    real_BS = whole.layout.valid_BS
    torch.testing.assert_close(output.tokens_BSD[real_BS], whole.tokens_BSD[real_BS])
    assert not bool(output.tokens_BSD[~real_BS].any())
