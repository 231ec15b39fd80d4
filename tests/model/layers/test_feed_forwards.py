"""Dense, MoE and multiway feed-forwards: who sees which token."""

from collections.abc import Mapping
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.model_card import Costs
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.sequence_layout import Layout, Span
from lightning_moevlm.model.dispatch import Capacity
from lightning_moevlm.model.experts import GatedExperts, MLPExperts
from lightning_moevlm.model.layers import DenseFFN, FeedForward, FFNOutput, MoEFFN, MultiwayFFN, dense_twin, initialise
from lightning_moevlm.model.layers.norms import NormKind
from lightning_moevlm.model.precision import PrecisionPolicy, set_precision
from lightning_moevlm.model.routers import TopKRouter

PAIR = (Span(Modality.IMAGE, 0, 2), Span(Modality.TEXT, 2, 5))
LENGTHS = {Modality.IMAGE: 2, Modality.TEXT: 3}


def layout(spans: tuple[Span, ...], num_padding: int = 0) -> Layout:
    length = spans[-1].stop
    return Layout(spans, (torch.arange(length) < length - num_padding).expand(3, length))


class AddConstant(FeedForward):
    """Stub: shows which branch a token took."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, tokens_BSD: Tensor, layout: Layout) -> FFNOutput:
        return FFNOutput(tokens_BSD + self.value, ())

    def add_hidden_norm(self, kind: NormKind) -> None:
        raise AssertionError("no hidden units")

    def costs(self, num_tokens: Mapping[Modality, int], separate: bool = False) -> Costs:
        return Costs(feed_forward=self.value * sum(num_tokens.values()))


def branches(ffn: MultiwayFFN, spans: tuple[Span, ...]) -> list[float]:
    tokens = torch.zeros(3, spans[-1].stop, 4)
    return ffn(tokens, layout(spans)).tokens_BSD[0, :, 0].tolist()


def test_every_modality_takes_its_own_branch() -> None:
    ffn = MultiwayFFN(AddConstant(1), AddConstant(2))
    assert branches(ffn, PAIR) == [1, 1, 2, 2, 2]
    assert ffn.costs(LENGTHS).flops == 2 * 1 + 3 * 2


def test_pairs_take_the_pair_branch_and_single_modalities_do_not() -> None:
    ffn = MultiwayFFN(AddConstant(1), AddConstant(2), AddConstant(3))
    assert branches(ffn, PAIR) == [3] * 5
    assert branches(ffn, (Span(Modality.IMAGE, 0, 2),)) == [1, 1]
    assert branches(ffn, (Span(Modality.TEXT, 0, 3),)) == [2, 2, 2]
    assert ffn.costs(LENGTHS).flops == 5 * 3
    assert ffn.costs(LENGTHS, separate=True).flops == 2 * 1 + 3 * 2
    assert ffn.costs({Modality.TEXT: 3}).flops == 3 * 2


def moe(capacity: Capacity | None = None, precision: PrecisionPolicy | None = None) -> MoEFFN:
    layer = MoEFFN(
        16,
        num_experts=4,
        router=partial(TopKRouter, top_k=2),
        experts=partial(MLPExperts, hidden_dim=24),
        capacity=capacity,
    )
    set_precision(layer, precision or PrecisionPolicy())
    initialise(layer, seed=0, std=0.5)
    return layer


def test_moe_plan_says_modality_and_padding_of_every_token() -> None:
    output = moe()(torch.randn(3, 5, 16), layout(PAIR, num_padding=1))
    (routed,) = output.plans
    assert routed.modalities == (Modality.IMAGE, Modality.TEXT)
    assert routed.plan.modality_T.tolist() == [0, 0, 1, 1, 1] * 3
    assert routed.plan.valid_T.tolist() == [True, True, True, True, False] * 3


def test_padding_is_never_routed_and_changes_no_other_token() -> None:
    layer = moe(Capacity(1.0, 1.0)).eval()
    tokens = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[:, -1] = 100.0
    masked = layout(PAIR, num_padding=1)
    assert torch.equal(layer(tokens, masked).tokens_BSD, layer(other, masked).tokens_BSD)
    assert torch.equal(layer(other, masked).tokens_BSD[:, -1], torch.zeros(3, 16))


def test_capacity_has_a_factor_for_training_and_one_for_evaluation() -> None:
    layer = moe(Capacity(train_factor=0.25, eval_factor=None))
    tokens = torch.randn(3, 5, 16)
    (training,) = layer.train()(tokens, layout(PAIR)).plans
    (evaluation,) = layer.eval()(tokens, layout(PAIR)).plans
    assert int(training.plan.kept_N.sum()) <= 4 * 2  # capacity ceil(0.25 * 30 / 4) = 2 for each of 4 experts
    assert bool(evaluation.plan.kept_N.all())


def test_router_region_stays_fp32_inside_a_bf16_trunk() -> None:
    tokens = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    expected = moe()(tokens, layout(PAIR)).plans[0].plan.logits_TE
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pinned = moe()(tokens, layout(PAIR)).plans[0].plan.logits_TE
        free = moe(precision=PrecisionPolicy(router=None))(tokens, layout(PAIR)).plans[0].plan.logits_TE
    assert torch.equal(pinned, expected)
    assert not torch.equal(free, expected)
    assert free.dtype == torch.float32


def test_a_gated_feed_forward_is_one_gated_expert() -> None:
    tokens_BSD = torch.randn(3, 3, 16, generator=torch.Generator().manual_seed(0))
    experts, dense = GatedExperts(16, 1, 24), DenseFFN(16, 24, is_gated=True)
    with torch.no_grad():
        for linear, stack in zip((dense.gate, dense.up, dense.down), experts.stacks(), strict=True):
            linear.weight.copy_(stack[0].T)  # type: ignore[union-attr]
    one = experts.run(tokens_BSD, tuple(stack[0] for stack in experts.stacks()), torch.matmul)
    found = dense(tokens_BSD, layout((Span(Modality.TEXT, 0, 3),))).tokens_BSD
    assert torch.allclose(found, one, atol=1e-6)
    # per token 3 products of 2 x 16 x 24 FLOPs
    assert dense.costs({Modality.TEXT: 3}).flops == 3 * 3 * 2 * 16 * 24


def test_twin_has_the_flops_of_the_moe() -> None:
    # MoE: router 2 * 16 * 4 = 128, experts 2 * (4 * 16 * 24) = 3072; dense: 4 * 16 * F, so F = 3200 / 64 = 50
    layer = moe()
    twin = dense_twin(layer, layer.dim, {Modality.TEXT: 7})
    assert layer.costs({Modality.TEXT: 1}).flops == 3200
    assert isinstance(twin.up, nn.Linear) and twin.up.out_features == 50


def test_dense_ffn_by_hand() -> None:
    ffn = DenseFFN(2, 3)
    for parameter in ffn.parameters():
        nn.init.ones_(parameter)
    tokens = torch.tensor([[[10.0, 10.0]]])  # 20 in each of 3 hidden units, GELU(20) = 20, sum 60
    assert ffn(tokens, layout((Span(Modality.TEXT, 0, 1),))).tokens_BSD.tolist() == [[[60.0, 60.0]]]


def test_no_experts_are_refused() -> None:
    with pytest.raises(UserError, match="num_experts is 0"):
        MoEFFN(16, num_experts=0)
