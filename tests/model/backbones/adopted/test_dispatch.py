"""Our dispatchers and our capacity for the experts of transformers."""

import copy
import inspect
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'lightning-moevlm[hf]'")

from transformers.integrations import moe

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import Modality, PairPlan
from lightning_moevlm.model.backbones.adopted.export.give_back import give_back_routers
from lightning_moevlm.model.backbones.adopted.routing.adopt import adopt
from lightning_moevlm.model.backbones.adopted.routing.current_pass import CurrentPass
from lightning_moevlm.model.backbones.adopted.routing.our_dispatch import BACKEND, run_by_ours
from lightning_moevlm.model.dispatch import (
    AutoDispatcher,
    ByDropRate,
    Capacity,
    Dispatcher,
    GroupedDispatcher,
    LoopDispatcher,
    ModalityFactors,
    PaddedDispatcher,
    SegmentDispatcher,
    apply_capacity,
)
from lightning_moevlm.model.dispatch.auto import auto
from lightning_moevlm.model.dispatch.auto.own_table import GIVEN, own_file
from lightning_moevlm.model.dispatch.auto.timings_table import Row, read_table
from lightning_moevlm.model.losses import AuxiliaryLosses
from lightning_moevlm.model.routers import TopKRouter
from tests.model.backbones.adopted.families import tiny
from tests.model.backbones.adopted.small_hugging_face import OLMOE, QWEN, small_hugging_face
from tests.model.backbones.adopted.test_adopt import gradients, run
from tests.model.backbones.adopted.test_hugging_face import BATCH, trained
from tests.training.callbacks.asked_run import Tagged

FORMS = ("olmoe", "deepseek_v3", "aria", "gpt_oss", "nemotron_h", "muse_spark")
"""Plain; with a factor; turned matrices; turned, joined otherwise and with biases; no gate; a norm behind."""
TIGHT = Capacity(train_factor=0.5, priority="token")


def both(family: str, dispatcher: Dispatcher, backend: str = "eager") -> tuple[list[Tensor], list[Tensor]]:
    """Return output and gradients of the model as it is, and of a copy whose experts a dispatcher runs."""
    torch.manual_seed(0)
    theirs = tiny(family).train()
    theirs.set_experts_implementation(backend)
    ours, current = copy.deepcopy(theirs), CurrentPass()
    layers = adopt(ours, current, dispatcher=dispatcher)
    expected, (found, _) = run(theirs)[0], run(ours, current)
    assert all(layer.dispatcher.in_use() for layer in layers.values())
    wanted, given = gradients(theirs, expected), gradients(ours, found)
    assert wanted.keys() == given.keys()
    pairs = [(wanted[name], given[name]) for name in wanted if wanted[name] is not None]
    return [expected, *(one for one, _ in pairs if one is not None)], [found, *(o for _, o in pairs if o is not None)]


def assert_near(expected: list[Tensor], found: list[Tensor]) -> None:
    for one, other in zip(expected, found, strict=True):
        assert float((other - one).detach().abs().max()) <= 1e-4 * float(one.detach().abs().max())


@pytest.mark.parametrize("family", FORMS)
def test_the_loop_computes_what_transformers_does(family: str) -> None:
    expected, found = both(family, LoopDispatcher())
    assert torch.equal(found[0], expected[0])
    assert_near(expected, found)


@pytest.mark.parametrize("dispatcher", [SegmentDispatcher(), GroupedDispatcher(), PaddedDispatcher(), AutoDispatcher()])
@pytest.mark.parametrize("family", ["aria", "gpt_oss", "muse_spark"])
def test_every_dispatcher_equals_theirs_to_rounding(family: str, dispatcher: Dispatcher) -> None:
    if family == "gpt_oss" and isinstance(dispatcher, GroupedDispatcher):
        with pytest.raises(UserError, match=r"width 1 in torch\.float32"):
            both(family, dispatcher)
        return
    expected, found = both(family, dispatcher, "grouped_mm")
    assert_near(expected, found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_auto_leaves_experts_to_transformers_where_it_was_faster(
    dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than 3 % faster; by its own back-end, so to the bit. What ran stands in the record."""
    monkeypatch.delenv(GIVEN, raising=False)
    theirs, of_ours = "transformers, grouped_mm", ("SegmentDispatcher", "GroupedDispatcher", "PaddedDispatcher")
    plain = small_hugging_face(QWEN, dtype=dtype)(*BATCH[:3]).tokens_BSD
    for milliseconds, runs in ((1.9, theirs), (1.95, "SegmentDispatcher")):
        times = dict.fromkeys(of_ours, 2.0) | {theirs: milliseconds}
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / runs))
        monkeypatch.setattr(auto, "measure_row", lambda case, *layer, times=times: Row(case, times))
        model = small_hugging_face(QWEN, dtype=dtype, dispatcher=AutoDispatcher())
        output = model(*BATCH[:3]).tokens_BSD
        assert torch.equal(output, plain) or runs != theirs
        for layer in model.layers:
            assert layer.dispatcher.in_use() == (runs,)
            assert (
                f"{runs} for " in layer.dispatcher.record()
                and f"{theirs} {milliseconds} ms" in layer.dispatcher.record()
            )
            assert list(layer.dispatcher.choices().values()) == [runs]


def test_auto_measures_theirs_beside_ours_with_all_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(GIVEN, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked: list[set[int]] = []
    grad = torch.autograd.grad

    def note(outputs: Tensor, inputs: list[Tensor], *more: Any, **named: Any) -> tuple[Tensor | None, ...]:
        found = grad(outputs, inputs, *more, **named)
        asked.append({id(each) for each, gradient in zip(inputs, found, strict=True) if gradient is not None})
        return found

    monkeypatch.setattr(torch.autograd, "grad", note)
    model = small_hugging_face(OLMOE, dispatcher=AutoDispatcher())
    model(None, BATCH.text_BL, BATCH.text_mask_BL)
    (row,) = read_table(own_file()).rows
    assert row.case.beside == "transformers, grouped_mm" and row.milliseconds.keys() == {
        "SegmentDispatcher", "GroupedDispatcher", "PaddedDispatcher", "transformers, grouped_mm",
    }  # fmt: skip
    stacks = {id(each) for each in model.layers[0].experts.parameters()}
    assert len(stacks) == 2 and sum(stacks <= each for each in asked) >= 4 * 2


def test_images_replaced_routers_and_checkpointing_are_dispatched() -> None:
    options: dict[str, Any] = {"router": partial(TopKRouter, top_k=2, renormalise=True), "gradient_checkpointing": True}
    plain = small_hugging_face(**options, experts_backend="eager")
    ours = small_hugging_face(**options, dispatcher=LoopDispatcher())
    outputs = [model(*BATCH[:3]).tokens_BSD for model in (plain, ours)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for one, other in zip(plain.parameters(), ours.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None and other.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-5)
    assert [layer.dispatcher.record() for layer in ours.layers] == [
        "LoopDispatcher, TopKRouter with the model's weights"
    ] * 2
    assert ours.layers[0].dispatcher is not ours.layers[1].dispatcher


@pytest.mark.parametrize("router", [None, partial(TopKRouter, top_k=2, renormalise=True)], ids=["theirs", "ours"])
@pytest.mark.parametrize("dispatcher", [None, SegmentDispatcher()], ids=["their_backend", "our_dispatcher"])
def test_capacity_drops_what_it_drops_in_our_mixtures(router: Any, dispatcher: Dispatcher | None) -> None:
    """The plan is that of `apply_capacity`; a dropped choice adds nothing, on whichever path the experts run."""
    free = small_hugging_face(QWEN, router=router)
    tight = small_hugging_face(QWEN, router=router, capacity=TIGHT, dispatcher=dispatcher)
    first = free(*BATCH[:3]).plans[0].plan
    seen: list[tuple[Tensor, ...]] = []
    experts = tight.get_submodule("model.model.language_model.layers.0.mlp").experts
    experts.register_forward_pre_hook(lambda module, args: seen.append(args))  # type: ignore[operator]
    output = tight(*BATCH[:3])
    plan = output.plans[0].plan
    assert isinstance(first, PairPlan) and isinstance(plan, PairPlan)
    expected = apply_capacity(first, TIGHT, training=True)
    assert torch.equal(plan.kept_N, expected.kept_N)
    assert 0 < int(plan.kept_N.sum()) < int(plan.chosen_N.sum())
    assert plan.capacity_T is not None
    weight_TK = seen[0][2]
    dropped_TK = (plan.chosen_N & ~plan.kept_N).view(2, -1).t()
    assert not bool(weight_TK[dropped_TK].any())
    assert bool((weight_TK[~dropped_TK] > 0).all())
    output.tokens_BSD.square().sum().backward()
    assert bool(tight.layers[0].router.rows().grad.any())  # type: ignore[union-attr]
    dropless = tight.eval()(*BATCH[:3])
    torch.testing.assert_close(dropless.tokens_BSD, free.eval()(*BATCH[:3]).tokens_BSD)


def test_dropped_choices_are_left_out_on_both_paths_alike() -> None:
    models = [small_hugging_face(QWEN, capacity=TIGHT, dispatcher=each) for each in (None, LoopDispatcher())]
    one, other = (model(*BATCH[:3]).tokens_BSD for model in models)
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_experts_of_one_modality_have_places_of_their_own() -> None:
    """ERNIE-4.5-VL: a layer sees the tokens of one modality; groups are whole samples all the same."""
    torch.manual_seed(0)
    model, current = tiny("ernie4_5_vl_moe").train(), CurrentPass()
    capacity = Capacity(train_factor=ModalityFactors(image=0.5, text=None), priority="token", group_size=1)
    adopt(model, current, capacity=capacity)
    _, plans = run(model, current)
    lost = dict.fromkeys(Modality, 0)
    for routed in plans:
        plan = routed.plan
        assert isinstance(plan, PairPlan) and plan.capacity_T is not None
        dropped_N = plan.chosen_N & ~plan.kept_N
        for modality in Modality:
            lost[modality] += int((dropped_N & (plan.modality_T[plan.token_N] == modality)).sum())
    assert lost[Modality.IMAGE] > 0 == lost[Modality.TEXT]


def test_a_run_logs_drops_and_proves_the_capacity() -> None:
    logger = Tagged()
    capacity = Capacity(train_factor=ByDropRate(0.2, start=0.6), priority="token")
    backbone = small_hugging_face(QWEN, capacity=capacity, dispatcher=SegmentDispatcher())
    trained(backbone, 3, logger, AuxiliaryLosses(load_balance=None, router_z=None))
    assert logger.tags["receipt/moe.capacity"].startswith("alive")
    assert any(value > 0 for _, value in logger.points["drop_rate/block0/image"])
    assert [value for key, value in logger.tags.items() if key.startswith("dispatch/")] == ["SegmentDispatcher"] * 2


def test_routers_that_are_given_back_run_by_transformers_again() -> None:
    model = small_hugging_face(QWEN, dispatcher=LoopDispatcher()).eval()
    expected = model(*BATCH[:3]).tokens_BSD
    config = model.text_config
    assert config._experts_implementation == "lightning_moevlm"
    assert "lightning_moevlm" not in model.config.to_json_string()
    give_back_routers(model.model)
    assert config._experts_implementation in ("grouped_mm", "eager")
    with model.current.open(model.current.tokens):
        torch.testing.assert_close(model(*BATCH[:3]).tokens_BSD, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": Capacity()}, "set capacity.priority to token"),
        ({"capacity": Capacity(priority="gate")}, "set capacity.priority to token"),
        ({"dispatcher": LoopDispatcher(), "experts_backend": "eager"}, "set one of them to null"),
        (
            {"dispatcher": PaddedDispatcher(factor=1.0), "capacity": Capacity(1.25, 1.25, "token")},
            "dispatcher.factor is 1.0",
        ),
    ],
)
def test_mistakes_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small_hugging_face(OLMOE, **options)


def test_back_ends_have_one_registry_which_observing_leaves_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts read the registry that their class was made with. A second copy of it would not know our name."""
    interface = inspect.signature(moe.use_experts_implementation).parameters["experts_interface"].default
    assert interface is moe.ALL_EXPERTS_FUNCTIONS
    ours = small_hugging_face(QWEN, dispatcher=LoopDispatcher())
    assert interface[BACKEND] is run_by_ours
    ours(*BATCH[:3])
    monkeypatch.delitem(moe.ExpertsInterface._global_mapping, BACKEND)
    with pytest.raises(KeyError, match=BACKEND):  # and not another back-end without a word
        ours(*BATCH[:3])
    observed = small_hugging_face(QWEN)
    observed(*BATCH[:3])
    assert BACKEND not in interface
    assert observed.text_config._experts_implementation != BACKEND


def test_experts_without_back_ends_are_refused() -> None:
    with pytest.raises(UserError, match=r"LongcatFlashExperts of .* takes no back-end"):
        adopt(tiny("longcat_flash"), CurrentPass(), dispatcher=LoopDispatcher())


@pytest.mark.parametrize("dispatcher", [None, LoopDispatcher()])
def test_a_copy_of_dispatch_copies_no_weights(dispatcher: Dispatcher | None) -> None:
    """A receipt rehearses a step with copies of dispatchers, and must fit beside a model of any size."""
    for layer in small_hugging_face(OLMOE, dispatcher=dispatcher).layers:
        copied: dict[int, Any] = {}
        copy.deepcopy(layer.dispatcher, copied)
        assert copied and not any(isinstance(each, Tensor) for each in copied.values())
