"""Our routers in models of transformers: equal to theirs where they decide alike, and said where they do not."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'lightning-moevlm[hf]'")

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import PairPlan
from lightning_moevlm.model.backbones.adopted.routing.adopt import adopt
from lightning_moevlm.model.backbones.adopted.routing.current_pass import CurrentPass
from lightning_moevlm.model.losses import AuxiliaryLosses
from lightning_moevlm.model.objectives import NextToken
from lightning_moevlm.model.routers import (
    ExpertChoiceRouter,
    Gate,
    HashRouter,
    SigmoidBiasRouter,
    SoftRouter,
    TopKRouter,
)
from lightning_moevlm.model.routers.group_limit import GroupLimit
from lightning_moevlm.training import VisionLanguageModule
from tests.model.backbones.adopted.families import tiny
from tests.model.backbones.adopted.small_hugging_face import LLAVA, OLMOE, QWEN, TEXT, small_hugging_face
from tests.model.backbones.adopted.test_adopt import VALID, run
from tests.model.backbones.adopted.test_hugging_face import BATCH, trained
from tests.training.callbacks.asked_run import Tagged

GROUPS = GroupLimit(num_groups=2, top_groups=1)
DEEPSEEK = partial(SigmoidBiasRouter, top_k=2, groups=GROUPS)


@pytest.mark.parametrize(
    ("family", "router"),
    [
        ("olmoe", partial(TopKRouter, top_k=2)),
        ("mixtral", partial(TopKRouter, top_k=2, renormalise=True)),
        ("qwen3_vl_moe", partial(TopKRouter, top_k=2, renormalise=True)),
        ("qwen3_vl_moe", partial(SigmoidBiasRouter, top_k=2, score="softmax")),  # its bias begins at 0
        ("deepseek_v3", DEEPSEEK),  # with a factor of 2.5 on its weights
        ("glm4v_moe", DEEPSEEK),
        ("solar_open", partial(SigmoidBiasRouter, top_k=2, groups=GROUPS)),
        ("ernie4_5_moe", partial(SigmoidBiasRouter, top_k=2, score="softmax")),
    ],
)
def test_routers_that_decide_alike_take_the_weights_and_are_exact(family: str, router: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    theirs = tiny(family)
    with torch.no_grad():
        for name, tensor in (*theirs.named_buffers(), *theirs.named_parameters()):
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(torch.randn(tensor.shape) / 10)
    expected, _ = run(theirs)
    current = CurrentPass()
    layers = adopt(theirs, current, router)
    output, plans = run(theirs, current)
    assert torch.equal(output, expected)
    assert len(plans) == len(layers)
    assert all(layer.dispatcher.record().endswith("with the model's weights") for layer in layers.values())
    output[VALID].square().sum().backward()
    assert all(bool(p.grad.any()) for layer in layers.values() for p in layer.router.parameters())  # type: ignore[union-attr]


def test_other_routers_start_anew_and_the_record_says_so() -> None:
    for router in (partial(TopKRouter, top_k=1), partial(TopKRouter, top_k=2, renormalise=True), DEEPSEEK):
        model = small_hugging_face(OLMOE, router=router)
        assert [layer.dispatcher.record() for layer in model.layers] == [
            f"transformers, grouped_mm, {router.func.__name__} from new weights"
        ] * 2
        output = model(None, *BATCH[1:3])
        assert output.tokens_BSD.isfinite().all()
        plan = output.plans[0].plan
        assert isinstance(plan, PairPlan)
        assert plan.expert_N.numel() == router.keywords["top_k"] * plan.num_tokens


def test_models_without_memory_take_routers_too() -> None:
    """As `sweep plan` and `describe` build them."""
    with torch.device("meta"):
        model = small_hugging_face(router=partial(SigmoidBiasRouter, top_k=2, score="softmax"))
    assert all(parameter.is_meta for layer in model.layers for parameter in layer.router.parameters())
    assert model.layers[0].dispatcher.record().endswith("with the model's weights")


def test_new_routers_keep_the_sum_of_the_weights() -> None:
    torch.manual_seed(0)
    model, current = tiny("deepseek_v3"), CurrentPass()
    adopt(model, current, partial(TopKRouter, top_k=2, renormalise=True))
    _, (routed,) = run(model, current)
    assert isinstance(routed.plan, PairPlan)
    torch.testing.assert_close(routed.plan.weight_N.view(2, -1).sum(dim=0), torch.full((20,), 2.5))


def test_arms_with_other_routers_share_every_other_weight() -> None:
    one, same, other = (
        small_hugging_face(router=router) for router in (None, partial(TopKRouter, top_k=2, renormalise=True), DEEPSEEK)
    )
    assert torch.equal(same(*BATCH[:3]).tokens_BSD, one(*BATCH[:3]).tokens_BSD)  # qwen3 renormalises
    weights = dict(one.named_parameters())
    for model in (same, other):
        rest = {name: p for name, p in model.named_parameters() if ".gate." not in name}
        assert len(rest) == len(weights) - 2
        assert all(torch.equal(parameter, weights[name]) for name, parameter in rest.items())
    VisionLanguageModule(other, NextToken, seed=1)
    assert not any(torch.equal(p, weights[name]) for name, p in other.named_parameters() if "q_proj" in name)


def test_jitter_and_loss_free_balance_act() -> None:
    logger = Tagged()
    router = partial(SigmoidBiasRouter, top_k=2, gate=Gate(jitter=0.1))
    backbone = small_hugging_face(QWEN, router=router)
    trained(backbone, 4, logger, AuxiliaryLosses(load_balance=None, router_z=None))
    assert logger.tags["receipt/gate.jitter"].startswith("alive")
    assert logger.tags["receipt/actions.rebalance"].startswith("alive")
    assert all(bool(layer.router.bias_AE.any()) for layer in backbone.layers)  # type: ignore[union-attr]


def test_their_own_bias_is_moved_which_transformers_leaves_alone() -> None:
    sizes = {"model_type": "glm4_moe", "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
    config = LLAVA | {"text_config": TEXT | sizes}
    still, moved = (small_hugging_face(config, bias_rate=rate) for rate in (None, 1e-2))
    for backbone in (still, moved):
        logger = Tagged()
        trained(backbone, 3, logger, AuxiliaryLosses(load_balance=None, router_z=None))  # signs may cancel in 4
        (layer,) = backbone.layers
        bias_E = dict(layer.router.theirs.named_buffers())["e_score_correction_bias"]  # type: ignore[union-attr]
        assert bool(bias_E.any()) is (backbone is moved)
        if backbone is moved:
            assert logger.tags["receipt/actions.rebalance"].startswith("alive")
            torch.testing.assert_close((bias_E / 1e-2).round() * 1e-2, bias_E)
    for options, message in (
        ({"config": OLMOE}, "OlmoeTopKRouter has no balancing bias"),
        ({"config": config, "router": DEEPSEEK}, "bias_rate moves the bias of the model's own routers"),
    ):
        with pytest.raises(UserError, match=message):
            small_hugging_face(**options, bias_rate=1e-3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (SoftRouter, "SoftRouter mixes tokens and chooses no experts"),
        (HashRouter, "HashRouter reads token ids, which adopted models do not pass"),
        (ExpertChoiceRouter, "a causal model cannot use ExpertChoiceRouter"),
    ],
)
def test_routers_that_do_not_fit_are_refused(router: Callable[..., Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small_hugging_face(router=router)


def test_families_whose_blocks_take_more_than_routers_of_ours_give_are_refused() -> None:
    with pytest.raises(UserError, match="InklingMoE takes 4 results of its router"):
        adopt(tiny("inkling"), CurrentPass(), partial(TopKRouter, top_k=2))
