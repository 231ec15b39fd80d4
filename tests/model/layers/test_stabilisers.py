"""Every switch of the trunk: neutral when off, alive when on, right by hand."""

import functools
from dataclasses import fields
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.sequence_layout import Layout, Span
from lightning_moevlm.model.dispatch import Dispatcher, GroupedDispatcher, LoopDispatcher, SegmentDispatcher
from lightning_moevlm.model.experts import ClampedGLU, ExpertStack, GatedExperts, MLPExperts, SiTUGLU
from lightning_moevlm.model.layers import Attention, Block, DenseFFN, Depth, ModelStabilisers, MoEFFN, initialise
from lightning_moevlm.model.layers.layer_scale import LayerScale
from lightning_moevlm.model.routers import Gate, TopKRouter
from lightning_moevlm.training.optim import parameter_groups
from tests.small_model import pair_batch, small_vl_moe

ACTIVE = {
    "qk_norm": {"qk_norm": False},
    "logit_cap": {"logit_cap": 1.0},
    "attention_gate": {"attention_gate": "head"},
    "attention_gate_element": {"attention_gate": "element"},
    "sub_norm": {"sub_norm": True},
    "norm": {"norm": "rms"},
    "norm_without_scale": {"norm": "rms_without_scale"},
    "norm_placement": {"norm_placement": "sandwich"},
    "norm_placement_post": {"norm_placement": "post"},
    "norm_placement_output": {"norm_placement": "output"},
    "layer_scale": {"layer_scale": 0.1},
    "residual_scaling": {"residual_scaling": "depth"},
    "residual_scaling_deepnorm": {"residual_scaling": "deepnorm", "norm_placement": "post"},
    "init_scheme": {"init_scheme": "fan_in"},
    "init_scheme_normal": {"init_scheme": "normal"},
    "init_scheme_depth": {"init_scheme": "depth_scaled"},
    "init_scale": {"init_scale": 0.1},
    "glu": {"glu": ClampedGLU(0.01)},
    "glu_situ": {"glu": SiTUGLU(0.01, 0.01)},
    "freeze_patches": {"freeze_patches": True},
}
LAYOUT = Layout((Span(Modality.TEXT, 0, 5),), torch.arange(5).expand(2, 5) < 4)


def encode(stabilisers: ModelStabilisers, is_gated: bool = False) -> Tensor:
    batch, model = pair_batch(), small_vl_moe(stabilisers=stabilisers, is_gated=is_gated)
    return model(batch.images_BRYX, batch.text_BL, batch.text_mask_BL).tokens_BSD


@functools.cache
def features_of(name: str | None, is_gated: bool) -> Tensor:
    """Return what `encode` gives in fp32 with a switch of `ACTIVE`, or with none."""
    return encode(ModelStabilisers(**ACTIVE[name] if name else {}), is_gated).detach()


def test_every_switch_has_a_case() -> None:
    assert {entry.name for entry in fields(ModelStabilisers)} <= set(ACTIVE)


@pytest.mark.parametrize("name", ACTIVE)
def test_a_switch_changes_the_model_and_every_parameter_still_learns(name: str) -> None:
    stabilisers, is_gated = ModelStabilisers(**ACTIVE[name]), name.startswith("glu")
    model, batch = small_vl_moe(stabilisers=stabilisers, is_gated=is_gated), pair_batch()
    loss = sum(
        model(*inputs).tokens_BSD.pow(3).mean()  # a sum of squares would be constant behind a norm
        for inputs in (
            (batch.images_BRYX, None, None),
            (None, batch.text_BL, batch.text_mask_BL),
            (batch.images_BRYX, batch.text_BL, batch.text_mask_BL, torch.eye(4, dtype=torch.bool)),
        )
    )
    loss.backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())}
    assert silent == ({"patches.project.weight", "patches.project.bias"} if name == "freeze_patches" else set())
    if name != "freeze_patches":
        plain = features_of(None, is_gated)
        assert not torch.allclose(features_of(name, is_gated), plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ACTIVE)
def test_every_switch_works_under_autocast(name: str) -> None:
    stabilisers, is_gated = ModelStabilisers(**ACTIVE[name]), name.startswith("glu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = encode(stabilisers, is_gated)
        tokens.float().square().sum().backward()
    error = (tokens.float() - features_of(name, is_gated)).abs()
    assert float(error.detach().median()) < 0.05  # a token near a tie may take another expert


def test_off_is_the_plain_block_bit_for_bit() -> None:
    torch.manual_seed(0)
    off = ModelStabilisers(qk_norm=False)
    block = Block(16, Attention(16, 4, off), DenseFFN(16, 24), off)
    initialise(block, seed=0, std=0.3)
    tokens = torch.randn(2, 5, 16)
    weights = dict(block.named_parameters())
    assert set(weights) == {
        *(f"{norm}.{name}" for norm in ("attention_norm", "ffn_norm") for name in ("weight", "bias")),
        "attention.query_key_value.weight", "attention.out.weight", "ffn.up.weight", "ffn.down.weight",
    }  # fmt: skip
    heads = F.linear(F.layer_norm(tokens, (16,)), weights["attention.query_key_value.weight"]).view(2, 5, 3, 4, 4)
    query, key, value = (part.transpose(1, 2) for part in heads.unbind(2))
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=LAYOUT.valid_BS[:, None, None, :])
    middle = tokens + F.linear(mixed.transpose(1, 2).flatten(2), weights["attention.out.weight"])
    hidden = F.gelu(F.linear(F.layer_norm(middle, (16,)), weights["ffn.up.weight"]))
    expected = middle + F.linear(hidden, weights["ffn.down.weight"])
    assert torch.equal(block(tokens, LAYOUT).tokens_BSD, expected)


def plain_block(**switches: object) -> Block:
    """A block whose branches are attention and a dense feed-forward without a norm of their own."""
    stabilisers = ModelStabilisers(**switches)
    block = Block(16, Attention(16, 4, stabilisers), DenseFFN(16, 24), stabilisers, Depth(1, 4))
    initialise(block, seed=0, std=0.3)
    return block


PLACEMENTS = {
    "pre": lambda x, f, n: x + f(n(x)),
    "post": lambda x, f, n: n(x + f(x)),
    "sandwich": lambda x, f, n: x + n(f(n(x))),
    "output": lambda x, f, n: x + n(f(x)),
}


@pytest.mark.parametrize("norm", ["layer", "rms", "rms_without_scale"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_norms_stand_where_the_formula_has_them(placement: str, norm: str) -> None:
    block = plain_block(norm_placement=placement, norm=norm)
    tokens = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))

    def n(x: Tensor) -> Tensor:  # scales are 1 and shifts 0 at the start
        centred = x - x.mean(-1, keepdim=True) if norm == "layer" else x
        return centred / (centred.square().mean(-1, keepdim=True) + (1e-5 if norm == "layer" else 1e-6)).sqrt()

    middle = PLACEMENTS[placement](tokens, lambda x: block.attention(x, LAYOUT).tokens_BSD, n)
    expected = PLACEMENTS[placement](middle, lambda x: block.ffn(x, LAYOUT).tokens_BSD, n)
    torch.testing.assert_close(block(tokens, LAYOUT).tokens_BSD, expected, rtol=1e-4, atol=1e-5)


def test_layer_scale_of_zero_starts_from_the_identity_and_learns() -> None:
    block = plain_block(layer_scale=0.0)
    tokens = torch.randn(2, 5, 16)
    output = block(tokens, LAYOUT).tokens_BSD
    assert torch.equal(output, tokens)
    (output * torch.randn(2, 5, 16)).sum().backward()
    assert bool((block.attention_scale.scale_D.grad != 0).all()) and bool((block.ffn_scale.scale_D.grad != 0).all())
    assert bool((block.ffn.down.weight.grad == 0).all())  # nothing to learn yet behind a closed gate


def test_layer_scale_by_hand() -> None:
    scale = LayerScale(2, 0.5)
    initialise(scale, seed=0)
    assert scale(torch.tensor([[[2.0, -4.0]]])).tolist() == [[[1.0, -2.0]]]


def test_deepnorm_by_hand() -> None:
    # 4 blocks: alpha = 8^(1/4) = 1.6818, beta = 32^(-1/4) = 0.4204
    deep = plain_block(norm_placement="post", residual_scaling="deepnorm")
    post = plain_block(norm_placement="post")
    assert deep.residual_weight == pytest.approx(1.6818, abs=1e-4)
    ours, theirs = dict(deep.named_parameters()), dict(post.named_parameters())
    for name in ("attention.out.weight", "ffn.up.weight", "ffn.down.weight"):
        torch.testing.assert_close(ours[name], 0.42045 * theirs[name], rtol=1e-4, atol=1e-6)
    fused, plain = ours["attention.query_key_value.weight"], theirs["attention.query_key_value.weight"]
    assert torch.equal(fused[:32], plain[:32])  # queries and keys
    torch.testing.assert_close(fused[32:], 0.42045 * plain[32:], rtol=1e-4, atol=1e-6)
    tokens = torch.randn(2, 5, 16)
    middle = F.layer_norm(1.6818 * tokens + deep.attention(tokens, LAYOUT).tokens_BSD, (16,))
    expected = F.layer_norm(1.6818 * middle + deep.ffn(middle, LAYOUT).tokens_BSD, (16,))
    torch.testing.assert_close(deep(tokens, LAYOUT).tokens_BSD, expected, rtol=1e-4, atol=1e-4)


def test_deepnorm_leaves_routers_alone() -> None:
    deep = small_vl_moe(stabilisers=ModelStabilisers(norm_placement="post", residual_scaling="deepnorm"))
    plain = small_vl_moe(stabilisers=ModelStabilisers(norm_placement="post"))
    ours, theirs = deep.blocks[1].ffn.image, plain.blocks[1].ffn.image
    assert torch.equal(ours.router.weight_ED, theirs.router.weight_ED)
    torch.testing.assert_close(ours.experts.up_EDF, 32**-0.25 * theirs.experts.up_EDF)


def drawn(**switches: object) -> dict[str, Tensor]:
    return dict(small_vl_moe(stabilisers=ModelStabilisers(**switches)).named_parameters())


RESIDUAL = ("attention.out.weight", "down.weight", "down_EFD")


@pytest.mark.parametrize(
    ("switches", "factor"),
    [
        ({"init_scale": 0.25}, lambda name, shape: 0.5),
        ({"residual_scaling": "depth"}, lambda name, shape: 8**-0.5 if name.endswith(RESIDUAL) else 1.0),
        ({"init_scheme": "fan_in", "init_scale": 0.1}, lambda name, shape: (0.1 / shape[1]) ** 0.5 / 0.02),
        (
            {"init_scheme": "depth_scaled"},
            lambda name, shape: shape[1] ** -0.5 / 0.02
            * ((2 * (int(name.split(".")[1]) + 1)) ** -0.5 if name.endswith(RESIDUAL) else 1.0),
        ),
    ],
    ids=["scale", "depth", "fan_in", "depth_scaled"],
)  # fmt: skip
def test_schemes_differ_from_the_default_by_their_factor_alone(switches: dict[str, object], factor) -> None:
    # 4 blocks; the draw of a name stays, so arms still start from the same point up to scale
    base, other = drawn(), drawn(**switches)
    assert base.keys() == other.keys()
    scaled = 0
    for name, values in base.items():
        in_block = name.startswith("blocks.") and values.ndim >= 2
        expected = values * factor(name, values.shape) if in_block else values
        torch.testing.assert_close(other[name], expected, rtol=1e-5, atol=0)
        scaled += in_block and not torch.equal(expected, values)
    assert scaled >= 8


def test_plain_normal_differs_in_the_tails_alone() -> None:
    base, normal = (
        drawn(init_scheme=scheme)["blocks.1.ffn.image.experts.up_EDF"] for scheme in ("truncated_normal", "normal")
    )
    inside = normal.abs() <= 0.04
    assert torch.equal(normal[inside], base[inside])
    assert float((~inside).float().mean()) == pytest.approx(0.0455, abs=0.01)  # 4.55 % of a normal lie beyond 2 std
    assert float(normal.detach().abs().max()) > 0.05 and float(base.detach().abs().max()) <= 0.04


def test_a_router_with_its_own_scale_keeps_it() -> None:
    moe = MoEFFN(16, router=partial(TopKRouter, gate=Gate(initial_std=0.0)))
    stabilisers = ModelStabilisers(init_scheme="fan_in")
    block = Block(16, Attention(16, 4), moe, stabilisers)
    initialise(block, seed=0)
    assert not bool(moe.router.weight_ED.any()) and bool(moe.experts.up_EDF.any())


def test_frozen_patches_are_drawn_like_the_others_and_left_out_of_the_optimiser() -> None:
    frozen, free = (small_vl_moe(stabilisers=ModelStabilisers(freeze_patches=on)) for on in (True, False))
    assert torch.equal(frozen.patches.project.weight, free.patches.project.weight)
    assert torch.equal(encode(ModelStabilisers(freeze_patches=True)), encode(ModelStabilisers()))
    trained = {id(p) for group in parameter_groups(frozen.named_parameters()) for p in group["params"]}
    assert id(frozen.patches.project.weight) not in trained and id(frozen.patches.position_PD) in trained


def test_sub_norm_of_attention_stands_before_the_output_projection() -> None:
    plain, normed = plain_block(), plain_block(sub_norm=True)
    tokens = torch.randn(2, 5, 16)
    identity = torch.eye(16)
    with torch.no_grad():
        plain.attention.out.weight.copy_(identity)
        normed.attention.out.weight.copy_(identity)
    heads = plain.attention(tokens, LAYOUT).tokens_BSD
    torch.testing.assert_close(normed.attention(tokens, LAYOUT).tokens_BSD, F.layer_norm(heads, (16,)))


def test_sub_norm_of_a_dense_feed_forward_by_hand() -> None:
    # hidden units of token (1, 3): GELU(30), GELU(10) = 30, 10; mean 20, std 10: normed 1, -1; times 2, 3: 2 - 3 = -1
    ffn = DenseFFN(2, 2)
    ffn.add_hidden_norm("layer")
    with torch.no_grad():
        ffn.up.weight.copy_(torch.tensor([[0.0, 10.0], [10.0, 0.0]]))
        ffn.down.weight.copy_(torch.tensor([[2.0, 3.0], [0.0, 0.0]]))
    output = ffn(torch.tensor([[[1.0, 3.0]]]), LAYOUT).tokens_BSD
    torch.testing.assert_close(output, torch.tensor([[[-1.0, 0.0]]]))


@pytest.mark.parametrize(
    "dispatcher", [LoopDispatcher(), SegmentDispatcher(), GroupedDispatcher()], ids=lambda d: type(d).__name__
)
@pytest.mark.parametrize("experts", [MLPExperts, GatedExperts])
def test_sub_norm_of_experts_is_the_same_on_every_dispatcher(
    experts: type[ExpertStack], dispatcher: Dispatcher
) -> None:
    layer = MoEFFN(16, 4, partial(TopKRouter, top_k=2), partial(experts, hidden_dim=24), dispatcher=dispatcher)
    layer.add_hidden_norm("rms")
    initialise(layer, seed=0, std=0.5)
    tokens = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    output = layer(tokens, LAYOUT)
    (routed,) = output.plans
    expected = torch.zeros(10, 16)
    for token, expert, weight, kept in zip(
        *(t.tolist() for t in (routed.plan.token_N, routed.plan.expert_N, routed.plan.weight_N, routed.plan.kept_N)),
        strict=True,
    ):
        if kept:
            row = tokens.view(10, 16)[token]
            *_, down = (stack[expert] for stack in layer.experts.stacks())
            inner = [row @ stack[expert] for stack in layer.experts.stacks()[:-1]]
            hidden = F.gelu(inner[0]) if len(inner) == 1 else F.silu(inner[0]) * inner[1]
            expected[token] += weight * (F.rms_norm(hidden, (24,), eps=1e-6) @ down)
    torch.testing.assert_close(output.tokens_BSD.view(10, 16), expected.detach(), rtol=1e-4, atol=1e-5)
    output.tokens_BSD.square().sum().backward()
    assert isinstance(layer.hidden_norm, nn.RMSNorm) and bool((layer.hidden_norm.weight.grad != 0).all())


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"logit_cap": 0.0}, "logit_cap is 0.0: choose a value above 0"),
        ({"init_scale": 0.0}, "init_scale is 0.0: choose a value above 0"),
        ({"residual_scaling": "deepnorm"}, "norm_placement is pre: set norm_placement to post"),
        ({"residual_scaling": "depth", "init_scheme": "depth_scaled"}, "choose one of them"),
    ],
)
def test_impossible_switches_are_refused(switches: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelStabilisers(**switches)
