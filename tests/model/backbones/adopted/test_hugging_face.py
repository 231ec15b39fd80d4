"""Models of transformers as backbones: built, trained, frozen, saved and continued. Extra `hf`; skipped if absent."""

import copy
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file
from torch.optim import AdamW
from torch.utils.data import DataLoader

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'lightning-moevlm[hf]'")

from torch.utils.flop_counter import FlopCounterMode
from transformers import BartConfig, BartForCausalLM
from transformers.models.olmoe import modeling_olmoe
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.configuration.resolver import ConfigResolver, describe_model
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.model.backbones import HuggingFaceModel, LoRA
from lightning_moevlm.model.backbones.adopted.export.give_back import give_back_routers
from lightning_moevlm.model.backbones.adopted.head import predict
from lightning_moevlm.model.backbones.adopted.images import image_inputs
from lightning_moevlm.model.losses import AuxiliaryLosses, LoadBalance
from lightning_moevlm.model.objectives import Contrastive, MaskedModelling, NextToken
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.callbacks import Liveness, Telemetry
from tests.conftest import PROJECT
from tests.model.backbones.adopted.small_hugging_face import LLAVA, OLMOE, QWEN, TEXT, small_hugging_face
from tests.small_model import pair_batch
from tests.training.callbacks.asked_run import Tagged
from tests.training.small_fit import fit

BATCH = pair_batch()


def trained(backbone: HuggingFaceModel, steps: int, logger: Tagged, losses: AuxiliaryLosses) -> VisionLanguageModule:
    module = VisionLanguageModule(
        backbone, NextToken, losses=losses, optimizer=partial(AdamW, lr=1e-2), trainable=None, seed=0
    )
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=logger, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, callbacks=[Liveness(), Telemetry()],
    )  # fmt: skip
    trainer.fit(module, DataLoader([BATCH] * steps, batch_size=None))
    return module


@pytest.mark.parametrize("config", [QWEN, LLAVA], ids=["grid", "plain"])
def test_pairs_are_seen_as_the_whole_model_sees_them(config: dict[str, Any]) -> None:
    model = small_hugging_face(config)
    output = model(*BATCH[:3])
    assert output.tokens_BSD.shape == (4, 4 + 8, 32)
    assert [(named.source, named.block) for named in output.plans] == [("pair", 0), ("pair", 1)]
    assert len(output.plans) == model.num_plans(tuple(Modality))
    assert BATCH.images_BRYX is not None and BATCH.text_BL is not None and model.images is not None
    ids = torch.cat([torch.full((4, 4), model.config.image_token_id), BATCH.text_BL], dim=1)
    inputs = {"input_ids": ids, "attention_mask": output.layout.valid_BS.long()}
    if config is QWEN:
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
    whole = model.model(**inputs, **model.images(BATCH.images_BRYX, torch.float32)).logits
    assert torch.equal(model.predict_text(output.tokens_BSD), whole)
    for named in output.plans:
        assert model.get_submodule(named.layer).path == named.layer  # type: ignore[union-attr]
        assert named.plan.chosen_loads(named.plan.modality_T, 2).sum(dim=1).tolist() == [2 * 4 * 4, 2 * 4 * 7]


def test_images_are_cut_as_their_own_processor_cuts_them() -> None:
    model = small_hugging_face()
    assert BATCH.images_BRYX is not None and model.images is not None
    own = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_resize=False
    )
    expected = own(images=list(BATCH.images_BRYX), return_tensors="pt")
    found = model.images(BATCH.images_BRYX, torch.float32)
    assert torch.equal(found["image_grid_thw"], expected["image_grid_thw"])
    torch.testing.assert_close(found["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize(
    ("file", "key"), [("preprocessor_config.json", None), ("processor_config.json", "image_processor")]
)
def test_images_are_scaled_as_the_directory_says(file: str, key: str | None, tmp_path: Path) -> None:
    own = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / file).write_text(json.dumps(own if key is None else {key: own}))
    inputs = image_inputs(small_hugging_face().config, 16, str(tmp_path))
    assert inputs is not None
    assert (inputs.mean, inputs.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize(
    "name", ["logits_scaling", "logit_scale", "final_logit_softcapping", "logits_mup_width_multiplier"]
)
def test_heads_of_other_families_scale_or_cap_their_logits(name: str) -> None:
    config = {
        "logits_scaling": {"model_type": "granitemoe", "logits_scaling": 3.0, "num_local_experts": 4},
        "logit_scale": {"model_type": "cohere2_moe", "logit_scale": 0.3, "first_k_dense_replace": 0, "num_experts": 4},
        "final_logit_softcapping": {"model_type": "beam", "final_logit_softcapping": 0.1, "num_experts": 4,
                                    "n_group": 2, "topk_group": 1, "mlp_layer_types": ["sparse"] * 2},
        "logits_mup_width_multiplier": {"model_type": "inkling_text", "logits_mup_width_multiplier": 4.0,
                                        "unpadded_vocab_size": 290},
    }[name]  # fmt: skip
    inner = {"moe_intermediate_size": TEXT["moe_intermediate_size"]} if name.startswith(("final", "logits_mup")) else {}
    model = small_hugging_face(OLMOE | inner | config)
    assert BATCH.text_BL is not None
    output = model(None, BATCH.text_BL, torch.ones_like(BATCH.text_BL, dtype=torch.bool))
    whole = model.model(input_ids=BATCH.text_BL).logits
    assert torch.equal(model.predict_text(output.tokens_BSD), whole)
    assert torch.equal(model.predict_text(output.tokens_BSD[:, 1]), whole[:, 1])


@pytest.mark.parametrize("config", [OLMOE, QWEN], ids=lambda config: config["model_type"])
def test_heads_are_asked_without_the_balance_loss(config: dict[str, Any]) -> None:
    """A configuration may switch it on; a head has no router logits to make it of."""
    model = small_hugging_face(config | {"output_router_logits": True})
    model.text_config.output_router_logits = True
    features_MD = model(None, *BATCH[1:3]).tokens_BSD[:, 0].detach().requires_grad_()
    logits_MV = model.predict_text(features_MD)
    assert logits_MV.shape == (4, model.text_config.vocab_size)
    (gradient_MD,) = torch.autograd.grad(logits_MV.sum(), features_MD)
    torch.testing.assert_close(gradient_MD, model.text_embedding_VD.sum(dim=0).expand_as(gradient_MD))
    assert (
        getattr(model.model, model.model.base_model_prefix)(input_ids=BATCH.text_BL).last_hidden_state.shape[-1] == 32
    )


def test_heads_that_run_parts_of_the_body_are_refused() -> None:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 8, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "decoder_ffn_dim": 8, "encoder_ffn_dim": 8, "vocab_size": 20}  # fmt: skip
    model = BartForCausalLM(BartConfig(**sizes))
    with pytest.raises(UserError, match=r"around BartDecoderWrapper are made through its `decoder`.*another family"):
        predict(model, torch.zeros(2, 8))


def test_random_weights_follow_from_the_seed() -> None:
    one = small_hugging_face()
    VisionLanguageModule(other := small_hugging_face(), NextToken, seed=1)
    assert sum(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)) > 10
    VisionLanguageModule(other, NextToken, seed=0)
    torch.manual_seed(5)
    for model in (other, small_hugging_face()):
        assert all(
            torch.equal(a, b) for a, b in zip(one.state_dict().values(), model.state_dict().values(), strict=True)
        )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[HuggingFaceModel, str]:
    """A small OLMoE, and a directory of transformers with its weights."""
    model = small_hugging_face(OLMOE)
    plain = modeling_olmoe.OlmoeForCausalLM._from_config(copy.deepcopy(model.config))
    plain.load_state_dict({k.replace(".router.theirs", ""): v for k, v in model.model.state_dict().items()})
    folder = tmp_path_factory.mktemp("olmoe")
    plain.save_pretrained(folder)
    return model, str(folder)


def test_directories_are_loaded_and_keep_their_weights(saved: tuple[HuggingFaceModel, str]) -> None:
    model, folder = saved
    loaded = HuggingFaceModel(path=folder, image_size=16, vocab_size=300, max_text_len=8)
    VisionLanguageModule(loaded, NextToken, seed=1)  # draws nothing
    assert all(module.training for module in loaded.modules())
    output, expected = (each(None, *BATCH[1:3]) for each in (loaded, model))
    assert torch.equal(output.tokens_BSD, expected.tokens_BSD)
    assert torch.equal(output.plans[0].plan.logits_TE, expected.plans[0].plan.logits_TE)


@pytest.mark.parametrize("options", [{"lora": LoRA(rank=2)}, {"frozen": ("all_but_routers",)}])
def test_checkpoints_hold_no_weights_that_stay_those_of_the_directory(
    saved: tuple[HuggingFaceModel, str], options: dict[str, Any], tmp_path: Path
) -> None:
    load = partial(HuggingFaceModel, image_size=16, vocab_size=300, max_text_len=8, **options)
    model = VisionLanguageModule(load(saved[1]), NextToken, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    state = model.state_dict()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert state.keys() == trained | {"backbone.origin"}
    other = VisionLanguageModule(load(saved[1]), NextToken, seed=0)
    other.load_state_dict(copy.deepcopy(state))
    ours, theirs = (each.backbone(None, *BATCH[1:3]).tokens_BSD for each in (model, other))
    assert torch.equal(ours, theirs)
    changed = modeling_olmoe.OlmoeForCausalLM.from_pretrained(saved[1])
    changed.model.layers[0].self_attn.q_proj.weight.data.mul_(1.01)
    changed.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"are not those that this checkpoint was trained from: give model\.backbone\.p"
    ):
        VisionLanguageModule(load(str(tmp_path)), NextToken, seed=0).load_state_dict(state)


def test_nothing_is_fetched_and_mistakes_are_explained(saved: tuple[HuggingFaceModel, str]) -> None:
    sizes = {"image_size": 16, "vocab_size": 300, "max_text_len": 8}
    for options, message in (
        ({}, "either `path`.*or `config`"),
        ({"path": "nobody/no-such-model"}, "to fetch it from the hub, set local_files_only to false"),
        ({"config": TEXT}, "has no model_type: name a family"),
        ({"config": {"model_type": "no_such_family"}}, "cannot build the config of no_such_family"),
        ({"config": OLMOE | {"num_expert": 8}}, "config.num_expert is no option of OlmoeConfig.*did you mean num_exp"),
        ({"config": OLMOE | {"moe_intermediate_size": 8}}, "config.moe_intermediate_size is no option of OlmoeConfig"),
        (
            {"config": QWEN | {"text_config": TEXT | {"num_expert": 2}}},
            "text_config.num_expert is no option of Qwen3VLMoeT",
        ),
        ({"config": QWEN, "image_size": 20}, "data.image_size 20 is not a multiple of 8"),
        ({"config": LLAVA, "image_size": 24}, "image_size is 24, and .* of llava takes images of 16 pixels alone: set"),
        ({"path": saved[1], "vocab_size": 301}, "embeds 300 ids, and the data has 301"),
        ({"config": OLMOE, "frozen": ("vision",)}, "has no vision to freeze: name some of language"),
        ({"config": OLMOE, "frozen": ("routers", "all_but_routers")}, "leaves nothing to train"),
    ):
        with pytest.raises(UserError, match=message):
            HuggingFaceModel(**(sizes | options))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has no vision tower"):
        small_hugging_face(OLMOE)(*BATCH[:3])
    with pytest.raises(UserError, match="choose the objective NextToken"):
        VisionLanguageModule(small_hugging_face(), MaskedModelling)


def test_parts_are_frozen() -> None:
    def trains(*parts: Any) -> set[str]:
        named = small_hugging_face(frozen=parts).model.named_parameters()
        return {name for name, parameter in named if parameter.requires_grad}

    routers = {name for name in trains() if ".gate." in name}
    assert len(routers) == 2
    assert trains("all_but_routers") == routers
    assert trains("routers") == trains() - routers
    without = trains("vision")
    assert any("merger" in name for name in without)
    assert not any("blocks" in name for name in without)
    assert not any("merger" in name for name in trains("vision", "connector"))
    assert all("visual" in name for name in trains("language"))


def test_adapters_and_routers_alone_are_trained() -> None:
    pytest.importorskip("peft", reason="needs the extra hf")
    plain, model = small_hugging_face(), small_hugging_face(lora=LoRA(rank=2))
    trained_names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"lora" if "lora_" in name else "gate" if ".gate." in name else name for name in trained_names} == {
        "lora",
        "gate",
    }
    assert torch.equal(model(*BATCH[:3]).tokens_BSD, plain(*BATCH[:3]).tokens_BSD)  # adapters start at 0
    model(*BATCH[:3]).tokens_BSD.square().mean().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)
    with pytest.raises(UserError, match=r"lora.targets \['no_such_layer'\]"):
        small_hugging_face(lora=LoRA(targets=("no_such_layer",)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointing_changes_no_bit(dtype: Any) -> None:
    results = []
    for on in (False, True):
        model = small_hugging_face(gradient_checkpointing=on, dtype=dtype).train()
        output = model(*BATCH[:3])
        (output.tokens_BSD.square().mean() + output.plans[0].plan.logits_TE.square().mean()).backward()
        results.append([output.tokens_BSD, *(p.grad for p in model.parameters() if p.grad is not None)])
        assert len(output.plans) == 2
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_trains_with_telemetry_losses_and_receipts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own balance loss is never computed, so ours cannot be doubled."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("transformers' load_balancing_loss_func was called")

    monkeypatch.setattr(modeling_olmoe, "load_balancing_loss_func", fail)
    logger = Tagged()
    backbone = small_hugging_face(LLAVA)
    before = [p.clone() for layer in backbone.layers for p in layer.router.parameters()]
    trained(backbone, 8, logger, AuxiliaryLosses(load_balance=LoadBalance(weight=0.01), router_z=None))
    assert logger.tags["receipt/losses.load_balance"].startswith("alive")
    losses = [value for _, value in logger.points["train/task_loss"]]
    assert losses[-1] < 0.8 * losses[0]
    after = [p for layer in backbone.layers for p in layer.router.parameters()]
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    for modality in ("image", "text"):
        loads = [logger.points[f"load/block1/{modality}/expert{e}"][0][1] for e in range(4)]
        assert sum(loads) == pytest.approx(1.0)


def test_frozen_routers_have_dead_balance_losses() -> None:
    losses = AuxiliaryLosses(load_balance=LoadBalance(weight=0.01), router_z=None)
    with pytest.raises(UserError, match=r"losses.load_balance is dead.*frozen"):
        trained(small_hugging_face(frozen=("routers",)), 1, Tagged(), losses)


def test_objectives_that_keep_image_and_text_apart_are_refused() -> None:
    module = VisionLanguageModule(small_hugging_face(), Contrastive)
    with pytest.raises(UserError, match="choose the objective NextToken"):
        module.objective(module.backbone, BATCH, module.draws("train"))


def test_costs_are_those_that_torch_counts() -> None:
    model = small_hugging_face(experts_backend="eager", attention="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*(each[:1] for each in BATCH[:3]))  # type: ignore[index]
    costs = model.costs({Modality.IMAGE: 4, Modality.TEXT: 8})
    assert costs.flops == pytest.approx(counter.get_total_flops(), rel=0.05)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert model.active_parameters(tuple(Modality)) < total
    assert model.active_parameters((Modality.TEXT,)) < model.active_parameters(tuple(Modality))


def test_the_shipped_configuration_is_described_without_memory() -> None:
    card = describe_model(ConfigResolver()([Path(PROJECT / "conf/hugging_face/qwen3_vl_moe.yaml")], {}))
    assert (card.total_parameters, card.active_parameters) == (702_704, 407_792)


def test_files_that_lack_weights_are_refused(tmp_path: Path) -> None:
    """transformers draws them at random and warns."""
    model = small_hugging_face(OLMOE).model
    give_back_routers(model)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    router = next(name for name in weights if name.endswith("mlp.gate.weight"))
    del weights[router]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"lack {re.escape(router)}, and OlmoeForCausalLM would draw them at random"):
        HuggingFaceModel(path=str(tmp_path), image_size=16, vocab_size=300, max_text_len=8)


def test_adapters_of_a_narrow_model_are_fp32_and_take_small_steps() -> None:
    """A step of 1e-4 moves every number of an adapter; in bf16 most numbers of 0.1 would stay."""
    model = small_hugging_face(QWEN, dtype="bfloat16", lora=LoRA(rank=2))
    module = VisionLanguageModule(model, NextToken, optimizer=partial(AdamW, lr=1e-4, weight_decay=0.0), seed=0)
    adapters = {name: p for name, p in model.named_parameters() if "lora_A" in name}
    assert {p.dtype for p in adapters.values()} == {torch.float32}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.fill_(0.1)  # they start at 0, and then no gradient reaches the others
    before = {name: p.detach().clone() for name, p in adapters.items()}
    fit(module, 1, batches=[BATCH])
    moved = [float((p != before[name]).float().mean()) for name, p in adapters.items()]
    assert min(moved) > 0.9
    assert model(*BATCH[:3]).tokens_BSD.dtype == torch.bfloat16
