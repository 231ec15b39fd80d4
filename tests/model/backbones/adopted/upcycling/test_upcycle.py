"""Dense models of transformers with mixtures of ours: the same numbers at first, and every switch of ours on them."""

from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'lightning-moevlm[hf]'")

from lightning.pytorch import Trainer
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.configuration.resolver import ConfigResolver, describe_model
from lightning_moevlm.contracts.routing_plan import Modality, PairPlan
from lightning_moevlm.model.backbones import HuggingFaceModel, LoRA
from lightning_moevlm.model.backbones.adopted.upcycling._upcycled_experts import UpcycledExperts
from lightning_moevlm.model.backbones.adopted.upcycling._upcycled_moe import UpcycledMoE
from lightning_moevlm.model.backbones.adopted.upcycling.upcycle import UpcycleDense, dense_again
from lightning_moevlm.model.dispatch import (
    Capacity,
    GroupedDispatcher,
    LoopDispatcher,
    PaddedDispatcher,
    SegmentDispatcher,
)
from lightning_moevlm.model.losses import AuxiliaryLosses, LoadBalance
from lightning_moevlm.model.objectives import NextToken
from lightning_moevlm.model.routers import Gate, HashRouter, SigmoidBiasRouter, SoftRouter, TopKRouter
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.callbacks import Liveness, Telemetry
from lightning_moevlm.training.optim import GradientStabilisers
from tests.conftest import PROJECT
from tests.model.backbones.adopted.upcycling.small_dense import FOUR, small_upcycled
from tests.small_model import pair_batch
from tests.training.callbacks.asked_run import Tagged

BATCH = pair_batch()
FAMILIES = ("llama", "gemma2", "phi", "phi3", "starcoder2", "gpt2", "lfm2", "qwen3_vl", "llava")
"""Gated and plain, gate and up in one matrix, biases, tanh GELU, a matrix the other way round, images."""


def logits(model: HuggingFaceModel) -> torch.Tensor:
    images = BATCH.images_BRYX if model.images is not None else None
    output = model(images, *BATCH[1:3])
    return model.predict_text(output.tokens_BSD)[output.layout.valid_BS]


def layers_of(model: HuggingFaceModel) -> list[UpcycledMoE]:
    return [layer for layer in model.layers if isinstance(layer, UpcycledMoE)]


@pytest.mark.parametrize("granularity", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_upcycled_model_computes_what_the_dense_one_does(family: str, granularity: int) -> None:
    model = small_upcycled(family, UpcycleDense(num_experts=4, granularity=granularity)).eval()
    mixed = logits(model)
    with dense_again(model.model):
        model.eval()  # feed-forwards have dropout in GPT-2
        dense = logits(model)
    torch.testing.assert_close(mixed, dense, rtol=1e-4, atol=1e-5)
    assert len(layers_of(model)) == 2
    for layer in layers_of(model):
        assert layer.start_difference is not None
        assert layer.start_difference < 1e-5
        assert layer.num_slices == granularity


def test_slices_of_a_copy_are_chosen_together_at_first() -> None:
    model = small_upcycled("llama", UpcycleDense(num_experts=8, granularity=2))
    plan = model(None, *BATCH[1:3]).plans[0].plan
    assert isinstance(plan, PairPlan)
    copies_TK = plan.expert_N.view(4, -1).t().sort().values // 2
    assert torch.equal(copies_TK[:, 0], copies_TK[:, 1])
    assert torch.equal(copies_TK[:, 2], copies_TK[:, 3])
    assert not torch.equal(copies_TK[:, 0], copies_TK[:, 2])


@pytest.mark.parametrize(
    "dispatcher",
    [LoopDispatcher(), SegmentDispatcher(), PaddedDispatcher(), GroupedDispatcher()],
    ids=lambda each: type(each).__name__,
)
@pytest.mark.parametrize("family", ["gemma2", "phi"])
def test_every_dispatcher_runs_its_experts(family: str, dispatcher: Any) -> None:
    """Biases are stacks of width 1, which grouped_mm refuses with the remedy."""
    model = small_upcycled(family, UpcycleDense(num_experts=4, noise=0.5))
    (layer, _) = layers_of(model)
    assert isinstance(layer.experts, UpcycledExperts)
    plan = layer._trial()
    plan = plan._replace(kept_N=plan.token_N < 40)  # the last tokens get no expert
    tokens_TD = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    wanted = [tokens_TD, *layer.experts.parameters()]
    if dispatcher.refusal(tokens_TD, layer.experts):
        assert family == "phi"
        return
    found, expected = (each.run_pairs(plan, tokens_TD, layer.experts) for each in (dispatcher, LoopDispatcher()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gradients, others = (torch.autograd.grad(each.square().sum(), wanted) for each in (found, expected))
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_images_and_texts_are_told_apart() -> None:
    model = small_upcycled("qwen3_vl")
    output = model(*BATCH[:3])
    assert [(named.source, named.block, named.layer) for named in output.plans] == [
        ("pair", 0, "model.model.language_model.layers.0.mlp"),
        ("pair", 1, "model.model.language_model.layers.1.mlp"),
    ]
    plan = output.plans[0].plan
    assert plan.chosen_loads(plan.modality_T, 2).sum(dim=1).tolist() == [2 * 4 * 4, 2 * 4 * 7]
    assert torch.equal(torch.unique(plan.modality_T), torch.tensor([int(each) for each in Modality]))


def test_some_blocks_stay_dense_and_costs_follow() -> None:
    all_of_them = small_upcycled("llama", UpcycleDense(num_experts=4))
    half = small_upcycled("llama", UpcycleDense(num_experts=4, moe_every=2))
    assert [layer.path for layer in layers_of(half)] == ["model.model.layers.1.mlp"]
    dense = 3 * 32 * 48
    size = sum(parameter.numel() for parameter in half.parameters())
    assert sum(p.numel() for p in all_of_them.parameters()) - size == 3 * dense + 4 * 32  # experts and a router more
    assert size - half.active_parameters((Modality.TEXT,)) == 2 * dense  # 2 of 4 experts rest
    assert half.costs({Modality.TEXT: 8}).experts == 8 * 2 * 2 * dense
    assert half.costs({Modality.TEXT: 8}).router == 8 * 2 * 4 * 32
    assert (
        all_of_them.costs({Modality.TEXT: 8}).feed_forward + 8 * 2 * dense
        == half.costs({Modality.TEXT: 8}).feed_forward
    )


def test_our_routers_route() -> None:
    """Weights of a single choice vary between tokens, so the experts are scaled to weigh 1 on average."""
    bias = small_upcycled("llama", FOUR, router=partial(SigmoidBiasRouter, top_k=2))
    assert all(layer.start_difference is not None and layer.start_difference < 1e-5 for layer in layers_of(bias))
    single = small_upcycled("llama", FOUR, router=TopKRouter)
    for layer in layers_of(single):
        assert layer.start_difference is not None
        assert 1e-3 < layer.start_difference < 0.5
        assert layer._mean_sum() == pytest.approx(0.25, abs=0.05)  # of four experts
        assert isinstance(layer.experts, UpcycledExperts)
        scale = layer.experts.down_EFD[0].detach() / layer.replaced[0].down_proj.weight.detach().t()  # type: ignore[union-attr, operator]
        assert float(scale.mean()) == pytest.approx(1 / layer._mean_sum(), rel=1e-4)


def test_switches_of_ours_act_on_it(caplog: pytest.LogCaptureFixture) -> None:
    """Jitter, a loss, a clip, a bias that balances: receipts say that each acts, and how exact the start was."""
    router = partial(SigmoidBiasRouter, top_k=2, gate=Gate(jitter=0.1))
    logger = Tagged()
    module = VisionLanguageModule(
        small_upcycled("qwen3_vl", UpcycleDense(num_experts=4, noise=0.01), router=router, gradient_checkpointing=True),
        NextToken, losses=AuxiliaryLosses(load_balance=LoadBalance(0.1)), gradient=GradientStabilisers(clip_norm=1e-3),
        optimizer=partial(AdamW, lr=1e-2),
    )  # fmt: skip
    trainer = Trainer(
        max_steps=3, accelerator="cpu", logger=logger, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, callbacks=[Liveness(1), Telemetry()],
    )  # fmt: skip
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trainer.fit(module, DataLoader([BATCH] * 3, batch_size=None))
    assert "2 upcycled mixtures differ from their dense start by at most 0.0" in caplog.text
    alive = {tag.removeprefix("receipt/") for tag, text in logger.tags.items() if text.startswith("alive")}
    assert alive == {
        "upcycle", "losses.load_balance", "losses.router_z", "gate.jitter", "gradient.clip_norm", "actions.rebalance"
    }  # fmt: skip
    assert {"load_entropy/block0/image", "load_entropy/block1/text"} <= logger.points.keys()
    for layer in layers_of(module.backbone):  # type: ignore[arg-type]
        assert isinstance(layer.router, SigmoidBiasRouter)
        assert bool(layer.router.bias_AE.any())


def test_adapters_are_trained_beside_experts() -> None:
    trained = {
        name.rpartition(".")[2]
        for name, parameter in small_upcycled("llama", lora=LoRA(train_experts=True)).named_parameters()
        if parameter.requires_grad and "lora_" not in name
    }
    assert trained == {"weight_ED", "gate_EDF", "up_EDF", "down_EFD"}


def test_capacity_and_dispatcher_are_ours() -> None:
    options = UpcycleDense(num_experts=4, top_k=1)
    model = small_upcycled("llama", options, capacity=Capacity(train_factor=0.5), dispatcher=LoopDispatcher())
    plan = model(None, *BATCH[1:3]).plans[0].plan
    assert isinstance(plan, PairPlan)
    assert int(plan.kept_N.sum()) < int(plan.chosen_N.sum())
    one, other = (layer.dispatcher for layer in layers_of(model))
    assert isinstance(one, LoopDispatcher)
    assert one is not other


def test_the_shipped_configuration_is_described_without_memory() -> None:
    card = describe_model(ConfigResolver()([PROJECT / "conf/hugging_face/qwen3_upcycled.yaml"], {}))
    dense = 3 * 64 * 128
    assert card.total_parameters - card.active_parameters == 2 * 6 * dense  # two of four blocks; 6 of 8 experts rest


def test_start_follows_from_seeds() -> None:
    one, other, third = (small_upcycled("llama", UpcycleDense(num_experts=4, noise=0.1)) for _ in range(3))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    third.draw_weights(1)
    differing = {name for name, a in one.named_parameters() if not torch.equal(a, third.get_parameter(name))}
    assert any(name.endswith("router.weight_ED") for name in differing)
    assert any(name.endswith("experts.up_EDF") for name in differing)
    assert not torch.equal(*(layer.router.weight_ED for layer in layers_of(one)))  # type: ignore[call-overload]


def test_a_directory_is_upcycled_and_its_feed_forwards_are_freed(tmp_path: Any) -> None:
    model = small_upcycled("llama")
    with dense_again(model.model):
        plain = AutoModelForCausalLM.from_config(model.config)
        plain.load_state_dict(model.model.state_dict())
    plain.save_pretrained(tmp_path)
    loaded = HuggingFaceModel(
        path=str(tmp_path), image_size=16, vocab_size=300, max_text_len=8, dtype="bfloat16", upcycle=FOUR
    )
    assert all(layer.replaced == () for layer in layers_of(loaded))
    assert {p.dtype for p in loaded.layers[0].experts.parameters()} == {torch.bfloat16}
    assert loaded.layers[0].router.rows().dtype == torch.float32  # type: ignore[union-attr]
    ids = BATCH.text_BL
    expected = plain(input_ids=ids).logits[BATCH.text_mask_BL]
    torch.testing.assert_close(logits(loaded).float(), expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("olmoe", {}, "has experts already"),
        ("opt", {}, "has no dense feed-forward that can be upcycled"),
        ("bitnet", {}, r"upcycled: model.layers.0.mlp computes something else"),
        ("llama", {"upcycle": UpcycleDense(num_experts=10, granularity=4)}, "does not divide num_experts 10"),
        ("llama", {"upcycle": UpcycleDense(num_experts=4, top_k=2), "router": TopKRouter}, "set one of them to null"),
        ("llama", {"upcycle": UpcycleDense(num_experts=1)}, r"num_experts is 1, and upcycle\.top_k 2 \(null takes 2"),
        ("llama", {"upcycle": UpcycleDense(num_experts=4, top_k=5)}, "choose top_k from 1 to num_experts"),
        ("llama", {"bias_rate": 1e-3}, "an upcycled model has none"),
        ("llama", {"lora": LoRA()}, "would stay alike: set lora.train_experts to true"),
        ("llama", {"router": SoftRouter}, "mixes tokens and chooses no experts"),
        ("llama", {"router": HashRouter}, "reads token ids"),
    ],
)
def test_mistakes_are_explained(family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small_upcycled(family, **options)


def test_a_dense_model_without_the_option_is_told_of_it() -> None:
    with pytest.raises(UserError, match=r"model\.backbone\.upcycle"):
        small_upcycled("llama", None)
