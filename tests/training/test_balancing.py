"""Counts of routing in training: once per token, over all micro-batches of a step, gone when the step is done."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.schedules import Ramp
from lightning_moevlm.contracts.sequence_layout import Layout, Span
from lightning_moevlm.model.dispatch import Capacity
from lightning_moevlm.model.layers import MoEFFN, initialise
from lightning_moevlm.model.losses import (
    AuxiliaryLosses,
    ByOverflow,
    LoadBalance,
    LossInput,
    OutputZ,
    ReLUL1,
    RouterOrthogonality,
    RouterZ,
    router_orthogonality,
)
from lightning_moevlm.model.objectives import Draws, MaskedModelling
from lightning_moevlm.model.routers import SMEBU, NoisyTopKRouter, QuantileUpdate, ReLURouter, SigmoidBiasRouter
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.step.routing_counts import RoutingCounter
from tests.routing import loss_of
from tests.small_model import pair_batch, small_vl_moe
from tests.training.small_fit import NoTask, RouterFactory, build, fit, routers


def total_load(plans: Sequence, layer: str) -> Tensor:
    mine = [named.plan for named in plans if named.layer == layer]
    return torch.stack([plan.chosen_loads()[0] for plan in mine]).sum(dim=0)


def test_global_scope_sees_every_micro_batch_so_far_and_no_step_before() -> None:
    losses = AuxiliaryLosses(LoadBalance(scope="global"), None)
    batches = [pair_batch(4, seed=seed) for seed in range(4)]
    outputs = fit(build(losses), 2, batches=batches, accumulate=2).outputs
    for first, last in ((0, 0), (0, 1), (2, 2), (2, 3)):
        so_far = [named for output in outputs[first : last + 1] for named in output["plans"]]
        expected = []
        for named in outputs[last]["plans"]:
            load_E = total_load(so_far, named.layer).float()
            plan = named.plan
            mean_E = (plan.probs_TE * plan.valid_T.unsqueeze(-1)).sum(0) / plan.valid_T.sum()
            expected.append(4 * (load_E / load_E.sum() * mean_E).sum())
        actual = outputs[last]["report"].auxiliary["load_balance"].raw
        torch.testing.assert_close(actual, torch.stack(expected).mean())


def test_global_scope_of_micro_batches_adds_up_to_the_whole_batch() -> None:
    # f is linear in counts and P in tokens, so with the counts of the whole step the halves' mean is the whole
    backbone = small_vl_moe()
    batch = pair_batch(8)
    halves = [Batch(*(field[part] for field in batch[:4])) for part in (slice(0, 4), slice(4, 8))]

    def plans(part: Batch) -> list:
        return list(backbone(part.images_BRYX, part.text_BL, part.text_mask_BL).plans)

    counter = RoutingCounter(backbone)
    for half in halves:
        counter.add(0, plans(half))
    totals = counter.totals(lambda flat: flat, torch.device("cpu"))
    of_halves = [
        LoadBalance(scope="global")(LossInput(n.plan, None, totals[n.layer])) for h in halves for n in plans(h)
    ]
    of_whole = [loss_of(LoadBalance(), named.plan) for named in plans(batch)]
    torch.testing.assert_close(torch.stack(of_halves).mean(), torch.stack(of_whole).mean())


@pytest.mark.parametrize("scope", ["sequence", "micro_batch", "global"])
def test_the_same_micro_batch_twice_is_one_step_on_it_once(scope: str) -> None:
    # Megatron-LM issues 3672 and 3769, Automodel issue 3359: the scale moved with accumulation
    losses = AuxiliaryLosses(LoadBalance(0.5, scope=scope), RouterZ(0.1))  # type: ignore[arg-type]
    batch = pair_batch()

    def trained(accumulate: int) -> dict[str, Tensor]:
        module = build(losses, lr=1.0, objective=NoTask)
        fit(module, 1, batches=[batch] * 2, accumulate=accumulate)
        return routers(module)

    once, twice = trained(1), trained(2)
    start = routers(build(losses, objective=NoTask))
    for name in once:
        torch.testing.assert_close(once[name], twice[name])
    assert any(not torch.equal(once[name], start[name]) for name in once)


def test_relu_weight_starts_where_remoe_does_and_moves_once_per_step(tmp_path: Path) -> None:
    # about half of 4 experts are active at the start and 1 is aimed at, so the weight grows by 1.2 each time
    losses = AuxiliaryLosses(None, None, relu_l1=ReLUL1())
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    batches = [pair_batch(4, seed=seed) for seed in range(6)]
    reports = fit(build(losses, ReLURouter), 3, batches=batches, accumulate=2, callbacks=[saver])
    weights = [float(term.weight) for term in reports.terms("relu_l1")]
    assert weights == pytest.approx([1e-8, 1e-8, 1.2e-8, 1.2e-8, 1.44e-8, 1.44e-8])
    # a checkpoint of step n holds what step n + 1 is made with
    for step in (1, 2, 3):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert float(saved["callbacks"]["ActionRunner"]["loss_weights"]["relu_l1"]) == pytest.approx(1e-8 * 1.2**step)


def test_weight_by_overflow_grows_while_too_much_is_dropped() -> None:
    losses = AuxiliaryLosses(LoadBalance(ByOverflow(0.01, start=0.5, factor=1.5)), None)
    batches = [pair_batch(4, seed=seed) for seed in range(3)]
    tight = fit(build(losses, capacity=Capacity(0.5, 0.5)), 3, batches=batches).terms("load_balance")
    assert [float(term.weight) for term in tight] == pytest.approx([0.5, 0.75, 1.125])
    dropless = fit(build(losses), 3, batches=batches).terms("load_balance")
    assert [float(term.weight) for term in dropless] == pytest.approx([0.5, 0.5 / 1.5, 0.5 / 2.25])


def test_a_scheduled_weight_is_that_of_the_optimiser_step() -> None:
    losses = AuxiliaryLosses(LoadBalance(Ramp(0.0, 1.0, 4)), None)
    batches = [pair_batch(4, seed=seed) for seed in range(4)]
    terms = fit(build(losses), 2, batches=batches, accumulate=2).terms("load_balance")
    assert [term.weight for term in terms] == [0.0, 0.0, 0.25, 0.25]


@pytest.mark.parametrize(
    ("losses", "router"),
    [
        (AuxiliaryLosses(None, None, relu_l1=ReLUL1()), ReLURouter),
        (AuxiliaryLosses(LoadBalance(ByOverflow(0.2), scope="global")), NoisyTopKRouter),
        (AuxiliaryLosses(None), partial(SigmoidBiasRouter, update_rate=0.1)),
        (AuxiliaryLosses(None), partial(SigmoidBiasRouter, update_rate=0.1, update=SMEBU())),
        (AuxiliaryLosses(None), partial(SigmoidBiasRouter, update=QuantileUpdate())),
    ],
    ids=["relu", "overflow, global scope", "bias", "bias by SMEBU", "bias by quantiles"],
)
def test_resumed_equals_uninterrupted(tmp_path: Path, losses: AuxiliaryLosses, router: RouterFactory) -> None:
    batches = [pair_batch(4, seed=seed) for seed in range(8)]
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    capacity = Capacity(1.0, 1.0)
    whole = build(losses, router, capacity, lr=0.1)
    uninterrupted = fit(whole, 4, batches=batches, accumulate=2, callbacks=[saver])
    again = build(losses, router, capacity, lr=0.1)
    rest = batches[4:] * 2  # a plain list knows no position: the epoch keeps its length, and begins with what is left
    resumed = fit(again, 4, batches=rest, accumulate=2, resume_from=tmp_path / "step=2.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    late = [output["report"] for output in uninterrupted.outputs[4:]]
    assert [float(report.total_loss) for report in late] == [
        float(output["report"].total_loss) for output in resumed.outputs
    ]
    late_weights = [float(term.weight) for report in late for term in report.auxiliary.values()]
    assert late_weights == [
        float(term.weight) for output in resumed.outputs for term in output["report"].auxiliary.values()
    ]


def test_recomputation_routes_alike_and_counts_once() -> None:
    # activation checkpointing runs forward twice; the plan that is counted and in the loss is the first one's
    ffn = MoEFFN(16, 4, router=NoisyTopKRouter)
    initialise(ffn, 0, 0.5)
    tokens_BSD = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    layout = Layout((Span(Modality.IMAGE, 0, 6),), torch.ones(2, 6, dtype=torch.bool))

    def gradients(recompute: bool) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(1)
        ffn.zero_grad()
        runs = 0

        def run(tokens: Tensor) -> tuple:
            nonlocal runs
            runs += 1
            return ffn(tokens, layout)

        inputs = tokens_BSD.clone().requires_grad_()
        output = checkpoint(run, inputs, use_reentrant=False) if recompute else run(inputs)
        plan = output.plans[0].plan
        terms = AuxiliaryLosses(LoadBalance(0.5)).terms([LossInput(plan)])
        (output.tokens_BSD.square().sum() + torch.stack([term.weighted for term in terms.values()]).sum()).backward()
        assert runs == (2 if recompute else 1)
        return [parameter.grad.clone() for parameter in ffn.parameters()], plan.chosen_loads()[0]

    (plain, load_E), (recomputed, load_again_E) = gradients(False), gradients(True)
    assert torch.equal(load_E, load_again_E) and int(load_E.sum()) == 2 * 6 * 2
    for one, two in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(one, two)


def test_counts_by_hand() -> None:
    # 4 pairs of 4 patches and 7 words (an eighth position is padding): the image layers route 16 tokens, text 28
    backbone = small_vl_moe(capacity=Capacity(0.5, 0.5))
    batch = pair_batch(4)
    counter = RoutingCounter(backbone)
    calls = 0

    def two_alike(flat: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return flat * 2

    for _ in range(3):
        counter.add(5, backbone(batch.images_BRYX, batch.text_BL, batch.text_mask_BL).plans)
    totals = counter.totals(two_alike, torch.device("cpu"))
    assert counter.totals(two_alike, torch.device("cpu")) is totals
    assert calls == 1  # for all layers, and for whoever asks next
    assert len(totals) == len([module for module in backbone.modules() if isinstance(module, MoEFFN)])
    image = totals["blocks.1.ffn.image"]
    assert image.token_A.tolist() == [2 * 3 * 16, 0]
    assert totals["blocks.1.ffn.text"].token_A.tolist() == [0, 2 * 3 * 28]
    assert int(image.chosen_AE.sum()) == 2 * 3 * 16 and int(image.chosen_AE[1].sum()) == 0
    assert int(image.kept_AE.sum()) < int(image.chosen_AE.sum())
    assert image.aimed_share == 0.25
    counter.add(6, [])  # the next optimiser step
    assert int(counter.totals(two_alike, torch.device("cpu"))["blocks.1.ffn.image"].token_A.sum()) == 0


def test_losses_are_fp32_under_bf16_mixed() -> None:
    losses = AuxiliaryLosses(None, None, router_orthogonality=RouterOrthogonality())
    module = build(losses)
    rows = [layer.router.rows() for layer in module.backbone.modules() if isinstance(layer, MoEFFN)]
    # each layer runs in two passes of a batch, so the mean over passes is the mean over layers
    exact = torch.stack([router_orthogonality(row) for row in rows if row is not None]).mean()
    (term,) = fit(module, 1, batches=[pair_batch()], precision="bf16-mixed").terms("router_orthogonality")
    torch.testing.assert_close(term.raw, exact.detach(), rtol=1e-6, atol=0)  # bf16 keeps 3 digits


def test_output_z_without_classes_is_refused() -> None:
    with pytest.raises(UserError, match=r"losses\.output_z"):
        VisionLanguageModule(small_vl_moe(), NoTask, AuxiliaryLosses(output_z=OutputZ()))


def test_output_z_reaches_the_head() -> None:
    losses = AuxiliaryLosses(None, None, OutputZ())
    module = VisionLanguageModule(small_vl_moe(), MaskedModelling, losses, init_std=0.3)
    output = module.objective(module.backbone, pair_batch(), Draws(0))
    assert output.log_partitions.keys() == {"text", "pair_text"}  # pixels have none
    losses.terms([], output.log_partitions)["output_z"].raw.backward()
    assert float(module.objective.text_head.bias_V.grad.abs().sum()) > 0
    assert module.objective.image_head.weight.grad is None
