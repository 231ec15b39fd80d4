"""Models of transformers with our layers in place of their routers: the same numbers to the bit, and plans beside them.

Extra `hf`; skipped if absent. The families are those that differ in what matters here: how they score, scale and group,
what else their routers take and return, and which tokens their experts see.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'lightning-moevlm[hf]'")

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import Modality, PairPlan
from lightning_moevlm.model.backbones.adopted.routing._adopted_moe import AdoptedMoE
from lightning_moevlm.model.backbones.adopted.routing._their_router import TheirRouter
from lightning_moevlm.model.backbones.adopted.routing.adopt import adopt
from lightning_moevlm.model.backbones.adopted.routing.current_pass import CurrentPass, Tokens
from lightning_moevlm.model.backbones.adopted.routing.seam import find_seams
from lightning_moevlm.model.layers.feed_forward.feed_forward import RoutedPlan
from tests.model.backbones.adopted.families import tiny

FAMILIES = ("olmoe", "deepseek_v3", "gpt_oss", "gemma4", "lfm2_moe", "inkling", "deepseek_v4")
IDS = torch.randint(3, 90, (2, 10), generator=torch.Generator().manual_seed(1))
VALID = torch.ones_like(IDS, dtype=torch.bool)
VALID[1, -3:] = False
MODALITY = torch.full_like(IDS, Modality.TEXT)
MODALITY[:, 2:6] = Modality.IMAGE

Pair = tuple[nn.Module, nn.Module, CurrentPass, dict[str, AdoptedMoE]]


def pair_of(
    family: str, prepare: Callable[[nn.Module], None] = lambda model: None, dtype: torch.dtype | None = None
) -> Pair:
    """Return a model as it is, and a copy that is adopted, both in training."""
    torch.manual_seed(0)
    theirs = tiny(family).train()
    if dtype is not None:
        theirs = theirs.to(dtype)
    prepare(theirs)
    ours, current = copy.deepcopy(theirs), CurrentPass()
    layers = adopt(ours, current)
    return theirs, ours, current, layers


def run(model: nn.Module, current: CurrentPass | None = None) -> tuple[Tensor, list[RoutedPlan]]:
    inputs = {"input_ids": IDS, "attention_mask": VALID.long(), "use_cache": False}
    torch.manual_seed(2)
    if current is None:
        output, plans = model(**inputs), []
    else:
        with current.open(Tokens(MODALITY, VALID)) as recorded:
            output = model(**inputs)
        plans = list(recorded)
    return (output.logits if hasattr(output, "logits") else output.last_hidden_state), plans


def gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor | None]:
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output.dtype)
    (output * weight)[VALID].sum().backward()
    return {name.replace(".router.theirs", ""): parameter.grad for name, parameter in model.named_parameters()}


def assert_equal(theirs: nn.Module, ours: nn.Module, current: CurrentPass) -> list[RoutedPlan]:
    expected, _ = run(theirs)
    output, plans = run(ours, current)
    assert torch.equal(output, expected)
    wanted, found = gradients(theirs, expected), gradients(ours, output)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        other = found[name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or torch.equal(gradient, other), name  # type: ignore[arg-type]
    return plans


@pytest.mark.parametrize("family", FAMILIES)
def test_adopted_models_are_exact_forward_and_backward(family: str) -> None:
    theirs, ours, current, layers = pair_of(family)
    plans = assert_equal(theirs, ours, current)
    assert len(plans) == len(layers) > 0


@pytest.mark.parametrize("backend", ["eager", "grouped_mm"])
def test_every_back_end_of_the_experts_gets_what_the_plan_says(backend: str) -> None:
    theirs, ours, current, layers = pair_of("deepseek_v3", lambda model: model.set_experts_implementation(backend))
    seen: list[tuple[Tensor, ...]] = []
    (path,) = layers
    experts = ours.get_submodule(path.rpartition(".")[0]).experts
    experts.register_forward_pre_hook(lambda module, args: seen.append(args))  # type: ignore[operator]
    (routed,) = assert_equal(theirs, ours, current)
    ((_, indices_TK, weights_TK),) = seen
    plan = routed.plan
    assert isinstance(plan, PairPlan)
    assert torch.equal(plan.expert_N.view(2, -1).t(), indices_TK)
    assert torch.equal(plan.weight_N.view(2, -1).t(), weights_TK)
    assert layers[path].dispatcher.record() == f"transformers, {backend}"


def test_weights_may_sum_to_more_than_one() -> None:
    _, ours, current, _ = pair_of("deepseek_v3")
    _, (routed,) = run(ours, current)
    plan = routed.plan
    assert isinstance(plan, PairPlan)
    torch.testing.assert_close(plan.weight_N.view(2, -1).sum(dim=0), torch.full((20,), 2.5))  # routed_scaling_factor
    torch.testing.assert_close(plan.probs_TE.sum(dim=-1), torch.ones(20))


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_narrow_models_have_exact_plans_in_fp32(family: str) -> None:
    theirs, ours, current, _ = pair_of(family, dtype=torch.bfloat16)
    plans = assert_equal(theirs, ours, current)
    for routed in plans:
        plan = routed.plan
        assert isinstance(plan, PairPlan)
        assert plan.logits_TE.dtype == plan.probs_TE.dtype == plan.weight_N.dtype == torch.float32


def test_autocast_does_not_narrow_plans() -> None:
    theirs, ours, current, _ = pair_of("olmoe")
    with torch.autocast("cpu", torch.bfloat16):
        plans = assert_equal(theirs, ours, current)
    for routed in plans:
        assert isinstance(routed.plan, PairPlan)
        assert routed.plan.probs_TE.dtype == torch.float32
        torch.testing.assert_close(routed.plan.probs_TE.sum(dim=-1), torch.ones(20))


def test_checkpointed_layers_record_once_and_keep_their_pass() -> None:
    """The second pass begins before the first one's layers run again."""
    theirs, ours, current, layers = pair_of("olmoe")
    kwargs = {"use_reentrant": False, "context_fn": current.checkpoint_contexts}
    ours.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)  # type: ignore[operator]
    expected, _ = run(theirs)
    output, plans = run(ours, current)
    assert len(plans) == len(layers) == 2
    seen: list[Tensor] = []
    for layer in layers.values():
        layer.router.register_forward_pre_hook(lambda module, args: seen.append(args[0].modality_T))
    with torch.no_grad(), current.open(Tokens(torch.full_like(IDS, Modality.TEXT), VALID)) as others:
        ours(input_ids=IDS, attention_mask=VALID.long(), use_cache=False)
    assert len(others) == 2
    seen.clear()
    wanted, found = gradients(theirs, expected), gradients(ours, output)
    assert len(seen) == 2  # each layer ran again, in the pass that it belongs to
    assert all(torch.equal(modality_T, MODALITY.reshape(-1)) for modality_T in seen)
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items() if gradient is not None)  # type: ignore[arg-type]
    assert len(others) == 2


def test_ties_are_broken_alike_when_layers_run_again() -> None:
    """A router whose rows are 0 ties all experts; the second run of a layer must choose as the first did."""

    def prepare(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                nn.init.zeros_(parameter)

    theirs, ours, current, layers = pair_of("olmoe", prepare)
    kwargs = {"use_reentrant": False, "context_fn": current.checkpoint_contexts}
    ours.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)  # type: ignore[operator]
    chosen: dict[str, list[Tensor]] = {}
    for path in layers:
        experts = ours.get_submodule(path.rpartition(".")[0]).experts
        experts.register_forward_pre_hook(lambda _, args, path=path: chosen.setdefault(path, []).append(args[1]))  # type: ignore[operator]
    plans = assert_equal(theirs, ours, current)
    for routed, (first_TK, second_TK) in zip(plans, chosen.values(), strict=True):
        assert isinstance(routed.plan, PairPlan)
        assert not bool(routed.plan.logits_TE.any())
        assert torch.equal(second_TK, first_TK)
        assert torch.equal(routed.plan.expert_N.view(2, -1).t(), first_TK)


def test_losses_on_plans_reach_routers_through_checkpoints() -> None:
    _, plain, plain_pass, layers = pair_of("olmoe")
    _, ours, current, others = pair_of("olmoe")
    kwargs = {"use_reentrant": False, "context_fn": current.checkpoint_contexts}
    ours.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)  # type: ignore[operator]
    for model, running in ((plain, plain_pass), (ours, current)):
        _, plans = run(model, running)
        loss = torch.stack([routed.plan.logits_TE.square().mean() for routed in plans]).sum()
        loss.backward(retain_graph=True)  # receipts ask several times
        loss.backward()
    for one, other in zip(layers.values(), others.values(), strict=True):
        rows, again = one.router.rows(), other.router.rows()
        assert rows is not None and again is not None
        assert rows.grad is not None and again.grad is not None
        assert bool(rows.grad.any())
        assert torch.equal(rows.grad, again.grad)


def test_isolated_experts_have_plans_of_their_modality() -> None:
    """ERNIE-4.5-VL sends the tokens of each modality to experts of their own (VL-MoE does, too)."""
    theirs, ours, current, _ = pair_of("ernie4_5_vl_moe")
    kinds = torch.where(MODALITY == Modality.IMAGE, 1, 0)
    inputs = {"input_ids": IDS, "attention_mask": VALID.long(), "use_cache": False, "moe_mm_token_type_ids": kinds}
    with current.open(Tokens(MODALITY, VALID)) as recorded:
        output = ours(**inputs).last_hidden_state
    assert torch.equal(output, theirs(**inputs).last_hidden_state)
    plans = list(recorded)
    assert [routed.modalities for routed in plans] == [(Modality.TEXT,), (Modality.IMAGE,)] * 2
    for routed in plans:
        plan = routed.plan
        assert isinstance(plan, PairPlan)
        is_own = (routed.modalities[0] == MODALITY).reshape(-1)
        assert plan.num_tokens == 20
        assert torch.equal(plan.valid_T, is_own & VALID.reshape(-1))
        assert torch.equal(plan.chosen_loads().sum(), 2 * plan.valid_T.sum())
        assert not bool(plan.logits_TE[~is_own].any())
        assert torch.equal(torch.unique(plan.token_N), is_own.nonzero().squeeze(1))


def test_hash_layers_choose_by_token_and_weigh_by_score() -> None:
    """DeepSeek-V4's first layers: experts are those of the token id, and the router also takes the ids."""
    theirs, ours, current, layers = pair_of("deepseek_v4")
    plan, learned = (routed.plan for routed in assert_equal(theirs, ours, current))
    assert isinstance(plan, PairPlan) and isinstance(learned, PairPlan)
    table_VK = next(iter(layers.values())).theirs.tid2eid
    assert torch.equal(plan.expert_N.view(2, -1).t(), table_VK[IDS.flatten()])
    assert not torch.equal(learned.expert_N, plan.expert_N)
    torch.testing.assert_close(plan.weight_N.view(2, -1).sum(dim=0), torch.full((20,), 1.5))
    assert float(plan.weight_N.detach().std()) > 0
    with torch.no_grad():
        table_VK.add_(1).remainder_(4)
    _, (moved, _) = run(ours, current)
    assert isinstance(moved.plan, PairPlan)
    assert torch.equal(moved.plan.expert_N, (plan.expert_N + 1) % 4)


def test_scores_are_found_by_asking() -> None:
    found = {}
    for family in ("olmoe", "deepseek_v3", "gemma4", "deepseek_v4", "gpt_oss", "phimoe"):
        seams, refusals = find_seams(tiny(family))
        assert not refusals
        found[family] = (seams[-1].gate.score, seams[-1].gate.sum and round(seams[-1].gate.sum, 4))
    assert found == {
        "olmoe": ("softmax", None),
        "deepseek_v3": ("sigmoid", 2.5),
        "gemma4": ("given", 1.0),  # its router returns probabilities
        "deepseek_v4": ("sqrt_softplus", 1.5),
        "gpt_oss": ("softmax", 1.0),
        "phimoe": (None, 2.0),  # a sampler of its own
    }


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("llama4", r"its experts take \(hidden_states\), and not tokens, indices and weights"),
        ("dbrx", "its router returns scores alone, and the block chooses by itself"),
        ("switch_transformers", "its router returns masks, and not the indices of experts"),
    ],
)
def test_other_structures_are_refused_with_the_reason(family: str, reason: str) -> None:
    with pytest.raises(UserError, match=rf"cannot be adopted: at [\w.]+, {reason}"):
        adopt(tiny(family), CurrentPass())


def test_dense_models_are_refused() -> None:
    with pytest.raises(UserError, match="Linear has no router beside experts"):
        adopt(nn.Linear(2, 2), CurrentPass())


def test_sharded_experts_are_refused() -> None:
    """Under expert parallelism routers return indices of one device, and E for experts of others."""
    model = tiny("olmoe")
    model._tp_size = 2  # type: ignore[assignment]
    with pytest.raises(UserError, match="load it without tensor or expert parallelism"):
        adopt(model, CurrentPass())


def test_tokens_of_another_sequence_are_refused() -> None:
    _, ours, current, _ = pair_of("olmoe")
    with pytest.raises(UserError, match="got 20 tokens in a pass of 10"), current.open(Tokens(MODALITY[:1], VALID[:1])):
        ours(input_ids=IDS)


def test_experts_are_in_the_checkpoint_once_and_in_their_layer() -> None:
    theirs, ours, _, layers = pair_of("olmoe")
    assert len(ours.state_dict()) == len(theirs.state_dict())
    layer = next(iter(layers.values()))
    assert isinstance(layer.router, TheirRouter)
    gate_EDF, down_EFD = layer.experts.stacks()
    assert gate_EDF.shape == (4, 32, 32)  # the half of gate_up_proj that the activation function reads
    assert down_EFD.shape == (4, 32, 32)
    assert {id(p) for p in layer.experts.parameters()} <= {id(p) for p in ours.parameters()}
