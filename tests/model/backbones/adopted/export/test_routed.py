"""Adopted models with trained routers that transformers has not: a small file beside the weights computes them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'lightning-moevlm[hf]'")

import transformers

from lightning_moevlm.cli.models.export_sample import draw_chats
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.backbones import HuggingFaceModel, LoRA
from lightning_moevlm.model.backbones.adopted.export.modeling_file import as_own_class
from lightning_moevlm.model.backbones.adopted.export.save import save_for_transformers
from lightning_moevlm.model.backbones.adopted.export.scoring import find_scoring
from lightning_moevlm.model.backbones.adopted.export.source_files import copy_source_files
from lightning_moevlm.model.backbones.adopted.routing.adopt import adopt
from lightning_moevlm.model.backbones.adopted.routing.current_pass import CurrentPass
from lightning_moevlm.model.dispatch import SegmentDispatcher
from lightning_moevlm.model.routers import CosineRouter, GroupLimitedRouter, SigmoidBiasRouter, TopKRouter
from lightning_moevlm.model.routers.group_limit import GroupLimit
from tests.model.backbones.adopted.export.reloading import BATCH, assert_reloads, load, logits, moved
from tests.model.backbones.adopted.families import families, tiny
from tests.model.backbones.adopted.small_chat import LLAVA_CHAT, save_llava
from tests.model.backbones.adopted.small_hugging_face import DEEPSEEK, LLAVA, OLMOE, QWEN, TEXT, small_hugging_face
from tests.model.backbones.adopted.test_adopt import run

BIAS = partial(SigmoidBiasRouter, top_k=2)
GATE = "model.layers.0.mlp.gate"
LOSS_FREE = partial(SigmoidBiasRouter, top_k=2, score="softmax")
GROUPS = GroupLimit(num_groups=2, top_groups=1, experts_per_score=1)
ERNIE: dict[str, Any] = {
    "model_type": "ernie4_5_vl_moe",
    "text_config": TEXT | {
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [16, 8], "moe_num_shared_experts": 1,
        "mlp_layer_types": ["sparse", "sparse"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "vision_config": {
        "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
        "spatial_merge_size": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "router", "options"),
    [
        (QWEN, LOSS_FREE, {}),
        (QWEN, BIAS, {"lora": LoRA()}),
        (ERNIE, partial(BIAS, per_modality=True), {}),  # experts of text and of images
        (LLAVA, BIAS, {"dispatcher": SegmentDispatcher()}),
        (OLMOE, partial(BIAS, score="sqrt_softplus", renormalise=False), {}),
        (OLMOE, partial(BIAS, weight_score="softmax"), {}),
        (OLMOE, partial(GroupLimitedRouter, top_k=2, groups=GROUPS), {}),
        (DEEPSEEK, partial(BIAS, groups=GROUPS), {}),  # its own takes the sum of two scores of a group
        (DEEPSEEK, partial(TopKRouter, top_k=2, renormalise=True), {}),  # with its factor of 2.5
    ],
    ids=[
        "loss_free",
        "lora",
        "isolated",
        "dispatcher",
        "sqrt_softplus",
        "two_scores",
        "groups",
        "bias_and_groups",
        "factor",
    ],
)
def test_trained_routers_are_exported(
    config: dict[str, Any], router: Callable[..., Any], options: dict[str, Any], tmp_path: Path
) -> None:
    model = moved(small_hugging_face(config, router=router, **options))
    name, model_class = type(model.layers[0].router).__name__, type(model.model).__name__
    saved = assert_reloads(model, tmp_path / "exported", rtol=1e-5, atol=1e-6)
    assert saved.why_own == f"{name} decides as no router of {model_class} does"
    assert saved.model_class == f"Routed{model_class}"
    assert saved.model_type == f"routed_{config['model_type']}"


def test_the_own_class_is_taken_where_it_is_equal(tmp_path: Path) -> None:
    """Of two routers one has a bias; Qwen3-VL-MoE knows none."""
    model = moved(small_hugging_face(QWEN, router=LOSS_FREE))
    model.layers[0].router.get_buffer("bias_AE").zero_()
    saved = assert_reloads(model, tmp_path / "one")
    mixtures = json.loads((tmp_path / "one" / "config.json").read_text())["mixtures"]
    assert saved.is_own
    assert list(mixtures) == ["model.language_model.layers.1.mlp.gate"]
    model = moved(small_hugging_face(QWEN, router=LOSS_FREE))
    for layer in model.layers:
        layer.router.get_buffer("bias_AE").zero_()
    assert not assert_reloads(model, tmp_path / "none").is_own
    assert not (tmp_path / "none" / "modeling_moevlm.py").exists()


@pytest.mark.parametrize(("router", "is_own"), [(BIAS, True), (partial(TopKRouter, top_k=2), False)])
def test_narrow_models_keep_new_routers_in_fp32(router: Callable[..., Any], is_own: bool, tmp_path: Path) -> None:
    model = moved(small_hugging_face(OLMOE, router=router, dtype="bfloat16"))
    saved = assert_reloads(model, tmp_path / "exported", rtol=0 if is_own else 0.05, atol=0 if is_own else 0.02)
    dtypes = {
        name.rpartition(".")[2]: each.dtype for name, each in model.model.get_submodule(GATE).state_dict().items()
    }
    assert saved.is_own is is_own
    assert model.model.dtype == torch.bfloat16
    if is_own:
        assert (saved.rounded, dtypes) == ("", {"weight": torch.float32, "bias": torch.float32})
    else:
        assert (saved.rounded, dtypes) == ("bfloat16", {"weight": torch.bfloat16})


def test_their_own_biases_of_narrow_models_keep_their_dtype(tmp_path: Path) -> None:
    model = small_hugging_face(DEEPSEEK, dtype="bfloat16")
    (layer,) = model.layers
    theirs: Any = layer.router.get_submodule("theirs")
    theirs.e_score_correction_bias = torch.tensor([0.3001, 0.1, 0.2, 0.7003])
    assert assert_reloads(model, tmp_path, rtol=0, atol=0).rounded == ""
    written = load_file(tmp_path / "model.safetensors")["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert torch.equal(written, torch.tensor([0.3001, 0.1, 0.2, 0.7003]))


def test_generation_with_a_cache_gives_what_the_trained_model_gives(tmp_path: Path) -> None:
    model = moved(small_hugging_face(OLMOE, router=BIAS))
    saved = save_for_transformers(model, tmp_path / "exported")
    loaded = load(tmp_path / "exported", saved)
    ids = BATCH.text_BL
    assert ids is not None
    made = loaded.generate(input_ids=ids[:, :4], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert made.shape == (4, 8)
    for length in range(4, 8):  # without a cache, by the model that was trained
        with torch.no_grad():
            expected = model.model(input_ids=made[:, :length], use_cache=False).logits[:, -1].argmax(dim=-1)
        assert torch.equal(made[:, length], expected)
    body = transformers.AutoModel.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    with torch.no_grad():
        features = body(input_ids=ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(loaded.lm_head(features), loaded(input_ids=ids, use_cache=False).logits)
    assert type(body).__name__ == "RoutedOlmoeModel"


def test_a_chat_model_is_compared_on_conversations_and_loaded_with_its_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, source = tmp_path / "exported", str(save_llava(tmp_path / "source"))
    model = moved(small_hugging_face(LLAVA_CHAT, router=BIAS))
    chats = draw_chats({"data": {"chat": {"processor": source}}}, sees=True)
    assert chats is not None and chats.images["pixel_values"].shape == (2, 3, 16, 16)
    monkeypatch.setattr(HuggingFaceModel, "forward", None)  # images of one size, which not all vision towers take
    saved = save_for_transformers(model, folder, chats)
    copy_source_files(source, folder)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    image = torch.randint(0, 256, (3, 20, 24), dtype=torch.uint8)
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]
    inputs = processor.apply_chat_template(
        chat, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    made = load(folder, saved).generate(**inputs, max_new_tokens=3, do_sample=False)
    assert type(processor).__name__ == "LlavaProcessor"
    assert made.shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize(
    ("router", "told"),
    [
        (partial(CosineRouter, top_k=2), "CosineRouter is no top-k of softmax, sigmoid or sqrt-softplus scores"),
        (partial(BIAS, per_modality=True), "with one bias for all modalities, .* write --format torch, or train with"),
    ],
)
def test_other_routers_are_refused(router: Callable[..., Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        save_for_transformers(moved(small_hugging_face(QWEN, router=router)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_router_logits_are_not_asked_for(tmp_path: Path) -> None:
    """transformers collects them by the class of the router, and would find none."""
    saved = save_for_transformers(small_hugging_face(OLMOE | {"output_router_logits": True}, router=BIAS), tmp_path)
    assert load(tmp_path, saved)(input_ids=torch.tensor([[5, 6]])).logits.shape == (1, 2, 300)


def test_the_folder_holds_no_bytecode_and_is_no_checkpoint_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    save_for_transformers(small_hugging_face(OLMOE, router=BIAS), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "modeling_moevlm.py",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"of the model_type routed_olmoe, whose code .* is not run"):
        HuggingFaceModel(path=str(tmp_path))


def test_weights_that_are_read_otherwise_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = moved(small_hugging_face(OLMOE)).model
    monkeypatch.setattr(transformers.OlmoeForCausalLM, "from_pretrained", lambda *_, **__: other)
    with pytest.raises(UserError, match=r"reads model\.embed_tokens\.weight of OlmoeForCausalLM otherwise"):
        save_for_transformers(small_hugging_face(OLMOE, router=partial(TopKRouter, top_k=2)), tmp_path)


@pytest.mark.slow  # half a minute
def test_every_family_of_language_models_takes_them(tmp_path: Path) -> None:
    """Those that are tiny with a head, and whose routers ours can replace."""
    found = []
    for family in families():
        model, current = tiny(family), CurrentPass()
        try:
            layers = adopt(model, current, BIAS)
        except UserError:
            continue
        if not type(model).__name__.endswith("ForCausalLM"):
            continue
        sample = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer in layers.values():
                for tensor in (*layer.router.parameters(), *layer.router.buffers()):
                    tensor.copy_(torch.randn(tensor.shape, generator=sample))
        expected, _ = run(model.eval(), current)
        scorings = {path: find_scoring(layer.router) for path, layer in layers.items()}
        assert all(scorings.values())
        written = as_own_class(model, layers, scorings, tmp_path / family)  # type: ignore[arg-type]
        written.save_pretrained(tmp_path / family)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / family, trust_remote_code=True)
        torch.testing.assert_close(run(loaded)[0], expected, rtol=1e-5, atol=1e-6)
        found.append(family)
    assert len(found) >= 50


LOADING = """
import sys
import torch, transformers
sys.modules["lightning_moevlm"] = None
model = transformers.AutoModelForImageTextToText.from_pretrained("exported", trust_remote_code=True)
inputs = torch.load("inputs.pt", weights_only=True)
with torch.no_grad():
    torch.save(model(**inputs, use_cache=False).logits, "logits.pt")
"""


@pytest.mark.slow  # another process, which imports transformers
def test_another_process_without_this_package_computes_the_same(tmp_path: Path) -> None:
    model = moved(small_hugging_face(QWEN, router=LOSS_FREE))
    save_for_transformers(model, tmp_path / "exported")
    ids, layout, seen, _ = model._join(*BATCH[:3])
    inputs = {"input_ids": ids, "attention_mask": layout.valid_BS.long(), **seen}
    inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
    torch.save(inputs, tmp_path / "inputs.pt")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", LOADING], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    theirs = torch.load(tmp_path / "logits.pt", weights_only=True)[layout.valid_BS]
    torch.testing.assert_close(theirs, logits(model), rtol=1e-5, atol=1e-6)
