"""Adopted and upcycled models saved for transformers: plain transformers loads them and computes equal logits."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'lightning-moevlm[hf]'")

import peft
import transformers

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.special_tokens import BOS, EOS, PAD
from lightning_moevlm.data.text.tokenizer import MIN_VOCAB_SIZE, read_tokenizer, train_tokenizer
from lightning_moevlm.model.backbones import HuggingFaceModel, LoRA
from lightning_moevlm.model.backbones.adopted.export.adapter import save_adapter
from lightning_moevlm.model.backbones.adopted.export.give_back import give_back_routers
from lightning_moevlm.model.backbones.adopted.export.save import save_for_transformers
from lightning_moevlm.model.backbones.adopted.export.scoring import find_scoring
from lightning_moevlm.model.backbones.adopted.export.source_files import copy_source_files, write_tokenizer
from lightning_moevlm.model.backbones.adopted.upcycling.upcycle import UpcycleDense
from lightning_moevlm.model.dispatch import Capacity
from lightning_moevlm.model.routers import (
    CosineRouter,
    Gate,
    NoisyTopKRouter,
    SigmoidBiasRouter,
    SinkhornRouter,
    TopKRouter,
)
from lightning_moevlm.model.routers.group_limit import GroupLimit
from tests.model.backbones.adopted.export.reloading import BATCH, assert_reloads, logits, moved
from tests.model.backbones.adopted.small_hugging_face import OLMOE, QWEN, TEXT, small_hugging_face
from tests.model.backbones.adopted.upcycling.small_dense import small_upcycled


@pytest.mark.parametrize(
    ("family", "model_class", "text_type"),
    [
        ("llama", "MixtralForCausalLM", "mixtral"),
        ("mistral", "MixtralForCausalLM", "mixtral"),
        ("qwen2", "Qwen2MoeForCausalLM", "qwen2_moe"),  # with a shared expert of no width
        ("qwen3", "Qwen3MoeForCausalLM", "qwen3_moe"),
        ("qwen3_vl", "Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe_text"),
        ("llava", "LlavaForConditionalGeneration", "qwen2_moe"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
def test_families_with_experts_take_upcycled_models(
    family: str, model_class: str, text_type: str, tmp_path: Path
) -> None:
    saved = assert_reloads(moved(small_upcycled(family)), tmp_path)
    assert (saved.model_class, saved.text_type, saved.is_own) == (model_class, text_type, False)
    assert saved.difference <= 1e-5
    assert not (tmp_path / "modeling_moevlm.py").exists()


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("gemma2", {}, "transformers has no family that is gemma2 with experts"),
        ("starcoder2", {}, "transformers has no family that is starcoder2 with experts"),
        ("llama", {"upcycle": UpcycleDense(num_experts=4, moe_every=2)}, "mixtral cannot have dense feed-forwards"),
        ("qwen3_vl", {"router": partial(SigmoidBiasRouter, top_k=2)}, "qwen3_vl_moe_text routes by the softmax alone"),
    ],
)
def test_others_get_a_small_file(family: str, options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    model = moved(small_upcycled(family, **options))
    for layer in model.layers:
        if isinstance(layer.router, SigmoidBiasRouter):
            layer.router.bias_AE.copy_(torch.tensor([[0.2, -0.1, 0.0, 0.1]]))
    saved = assert_reloads(model, tmp_path)
    assert saved.is_own
    assert saved.why_own.startswith(reason)
    assert saved.model_type == f"routed_{family}"
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoConfig"].startswith("modeling_moevlm.")
    model = model.model
    if not saved.sees:
        ids = BATCH.text_BL
        assert ids is not None
        assert model.generate(input_ids=ids[:, :4], max_new_tokens=3, do_sample=False).shape == (4, 7)


def test_dense_blocks_and_slices_fit_qwen_moe(tmp_path: Path) -> None:
    options = UpcycleDense(num_experts=8, granularity=2, moe_every=2)
    saved = assert_reloads(moved(small_upcycled("qwen3", options)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (saved.text_type, config["mlp_only_layers"], config["moe_intermediate_size"]) == ("qwen3_moe", [0], 24)
    assert (config["num_experts_per_tok"], config["norm_topk_prob"], config["intermediate_size"]) == (4, True, 48)


def test_narrow_models_are_saved_narrow_and_say_that_routers_are_rounded(tmp_path: Path) -> None:
    model = small_upcycled("qwen3", dtype="bfloat16")
    saved = assert_reloads(model, tmp_path, rtol=0.05, atol=0.02)
    assert saved.rounded == "bfloat16"
    assert saved.difference <= 1e-5  # compared in fp32
    assert model.model.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["theirs", "ours", "bias"])
def test_adopted_models_are_saved_as_they_came(kind: str, tmp_path: Path) -> None:
    deepseek = TEXT | {
        "model_type": "deepseek_v3", "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4, "head_dim": 4,
    }  # fmt: skip
    model = {
        "theirs": lambda: small_hugging_face(QWEN),
        "ours": lambda: small_hugging_face(OLMOE, router=partial(TopKRouter, top_k=2)),
        "bias": lambda: small_hugging_face(deepseek, router=partial(SigmoidBiasRouter, top_k=2)),
    }[kind]()
    moved(model)
    if kind == "bias":
        (layer,) = model.layers
        assert isinstance(layer.router, SigmoidBiasRouter)
        layer.router.bias_AE.copy_(torch.tensor([[0.2, -0.1, 0.0, 0.1]]))
    saved = assert_reloads(model, tmp_path, rtol=0 if kind == "theirs" else 1e-5, atol=0 if kind == "theirs" else 1e-6)
    assert not saved.is_own


def test_adapters_are_merged(tmp_path: Path) -> None:
    saved = assert_reloads(moved(small_hugging_face(QWEN, lora=LoRA())), tmp_path)
    assert saved.num_adapters == 2 * 4


def test_routers_that_transformers_has_not_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"CosineRouter is no top-k of softmax.* write --format torch"):
        save_for_transformers(small_upcycled("qwen3", router=partial(CosineRouter, top_k=2)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_scorings_are_found_by_asking() -> None:
    mixed = SigmoidBiasRouter(8, 4, 2, weight_score="softmax")
    mixed.bias_AE[0, 0] = 0.2
    found = {}
    for name, router in {
        "top-k": TopKRouter(8, 4, 2),
        "renormalised": TopKRouter(8, 4, 2, renormalise=True),
        "warm": TopKRouter(8, 4, 2, gate=Gate(temperature=2.0, jitter=0.1)),
        "noisy": NoisyTopKRouter(8, 4, 2),
        "sigmoid": SigmoidBiasRouter(8, 4, 2),
        "sqrt": SigmoidBiasRouter(8, 4, 2, score="sqrt_softplus"),
        "mixed": mixed,
        "grouped": SigmoidBiasRouter(8, 4, 2, groups=GroupLimit()),
        "sinkhorn": SinkhornRouter(8, 4),
        "cosine": CosineRouter(8, 4, 2),
    }.items():
        scoring = find_scoring(router)
        found[name] = None if scoring is None else (scoring.score, scoring.weight_score, scoring.renormalise)
    assert found == {
        "top-k": ("softmax", "softmax", False),
        "renormalised": ("softmax", "softmax", True),
        "warm": ("softmax", "softmax", False),
        "noisy": ("softmax", "softmax", False),  # its noise is of training alone
        "sigmoid": ("sigmoid", "sigmoid", True),
        "sqrt": ("sqrt_softplus", "sqrt_softplus", True),
        "mixed": ("sigmoid", "softmax", True),
        "grouped": ("sigmoid", "sigmoid", True),
        "sinkhorn": ("sigmoid", "sigmoid", False),  # likewise its balance,
        "cosine": None,
    }
    per_modality = SigmoidBiasRouter(8, 4, 2, per_modality=True)
    per_modality.bias_AE[0, 0] = 1.0
    assert find_scoring(per_modality) is None
    alone = find_scoring(per_modality, (Modality.IMAGE,))
    assert alone is not None and alone.bias_E is not None
    assert torch.equal(alone.bias_E, per_modality.bias_AE[int(Modality.IMAGE)])


def test_files_of_the_source_are_copied_without_weights(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "export"
    source.mkdir()
    folder.mkdir()
    kept = ("chat_template.jinja", "merges.txt", "preprocessor_config.json", "tokenizer.json")
    for name in (*kept, "config.json", "model.safetensors", "model.safetensors.index.json", "README.md"):
        (source / name).write_text("{}")
    assert copy_source_files(str(source), folder) == list(kept)
    assert sorted(file.name for file in folder.iterdir()) == list(kept)
    assert copy_source_files("nobody/no-such-model", folder) == []


def test_our_tokenizer_encodes_in_transformers_as_in_training(tmp_path: Path) -> None:
    train_tokenizer(["a red dog on a table"] * 3, MIN_VOCAB_SIZE + 4, tmp_path)
    own = read_tokenizer(tmp_path / "tokenizer.json")
    folder = tmp_path / "export"
    folder.mkdir()
    assert write_tokenizer(own.to_json(), folder) == ["tokenizer.json", "tokenizer_config.json"]
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert loaded("a red table").input_ids == [BOS, *own.ids("a red table")]
    assert (loaded.pad_token_id, loaded.eos_token_id) == (PAD, EOS)


def test_a_capacity_in_evaluation_is_refused(tmp_path: Path) -> None:
    model = small_hugging_face(OLMOE, capacity=Capacity(1.0, 1.25, "token"))
    with pytest.raises(UserError, match=r"capacity\.eval_factor is 1\.25, and transformers has no capacity"):
        save_for_transformers(model, tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"lora": LoRA(rank=2)},
        {"lora": LoRA(rank=2, train_experts=True), "router": partial(TopKRouter, top_k=2)},
        {"lora": LoRA(rank=2, train_routers=False), "dtype": "bfloat16"},
        {"lora": LoRA(rank=2), "router": partial(TopKRouter, top_k=2), "dtype": "bfloat16"},
    ],
    ids=["routers", "experts", "adapters_alone", "narrow"],
)
def test_adapters_are_saved_alone_and_peft_loads_them(options: dict[str, Any], tmp_path: Path) -> None:
    source = small_hugging_face(OLMOE)
    save_for_transformers(source, tmp_path / "source")
    build = partial(HuggingFaceModel, path=str(tmp_path / "source"), image_size=16, vocab_size=300, max_text_len=8)
    model = build(**options)
    sample = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=sample))
    ours = logits(model)
    folder, lora = tmp_path / "adapter", options["lora"]
    folder.mkdir()
    saved = save_adapter(model, str(tmp_path / "source"), folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=options.get("dtype"))
    loaded = build(dtype=options.get("dtype", "float32"))
    give_back_routers(loaded.model)
    assert float((logits(loaded) - ours).abs().max()) > 1e-3
    loaded.model = peft.PeftModel.from_pretrained(base, folder).get_base_model()
    tolerance = 0.05 if "dtype" in options else 1e-5
    torch.testing.assert_close(logits(loaded), ours, rtol=tolerance, atol=tolerance)
    assert saved.num_adapters == 2 * 4
    assert {module.rpartition(".")[2] for module in saved.modules} == (
        {name for name, is_trained in (("gate", lora.train_routers), ("experts", lora.train_experts)) if is_trained}
    )


@pytest.mark.parametrize(
    ("options", "path", "message"),
    [
        ({}, "somewhere", "has no low-rank adapters"),
        ({"lora": LoRA()}, None, "this run began with random weights"),
        ({"lora": LoRA(), "router": partial(SigmoidBiasRouter, top_k=2)}, "somewhere", "write --format hf"),
    ],
)
def test_adapters_that_peft_cannot_load_are_refused(
    options: dict[str, Any], path: str | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        save_adapter(small_hugging_face(OLMOE, **options), path, tmp_path)
    with pytest.raises(UserError, match="upcycled experts are no part of the checkpoint"):
        save_adapter(small_upcycled("llama", lora=LoRA(train_experts=True)), "somewhere", tmp_path)
    assert list(tmp_path.iterdir()) == []
