"""The same contracts under every precision that a CPU has: through the Trainer, and on the command line."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import FSDPPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.step_records import LossReport, ObjectiveOutput
from lightning_moevlm.model.layers import ModelStabilisers
from lightning_moevlm.model.precision import PrecisionPolicy, Simulation
from lightning_moevlm.model.routers import SigmoidBiasRouter, SoftRouter
from lightning_moevlm.training import Evaluation, RegionHalfPrecision, StepOutput, VisionLanguageModule
from tests.conftest import last_checkpoint
from tests.small_model import pair_batch, small_vl_moe
from tests.small_run import SMALL, budget

Moevlm = Callable[..., str]

PRECISIONS = ["32-true", "bf16-mixed", "bf16-true"]
HALF = [pytest.param("32-true", marks=pytest.mark.slow), *PRECISIONS[1:]]  # what bf16 could spoil


def loader(num_batches: int, num_samples: int = 4) -> DataLoader[Batch]:
    batches = [pair_batch(num_samples, seed=seed) for seed in range(num_batches)]
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def trainer(precision: str, *callbacks: Callback, steps: int = 2, **options: object) -> Trainer:
    return Trainer(
        accelerator="cpu", precision=precision, max_steps=steps, callbacks=list(callbacks), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
        **options,
    )  # fmt: skip


def dtypes(module: VisionLanguageModule) -> dict[str, set[torch.dtype]]:
    """Parameter dtypes by the part of the model that they are in."""
    found: dict[str, set[torch.dtype]] = {}
    for name, parameter in module.named_parameters():
        part = next((part for part in ("router", "experts", "objective", "norm") if part in name), "trunk")
        found.setdefault(part, set()).add(parameter.dtype)
    return found


class Plans(Callback):
    """Keeps the plans of training steps."""

    def __init__(self) -> None:
        self.outputs: list[StepOutput] = []

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LightningModule, outputs: StepOutput, batch: Batch, batch_idx: int
    ) -> None:
        self.outputs.append(outputs)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_logits_losses_and_router_weights_are_fp32(precision: str) -> None:
    module, seen = VisionLanguageModule(small_vl_moe(top_k=2)), Plans()
    trainer(precision, seen).fit(module, loader(2))
    assert len(seen.outputs) == 2
    for output in seen.outputs:
        assert output["loss"].dtype == torch.float32 and bool(output["loss"].isfinite())
        for term in (*output["report"].task.values(), *output["report"].auxiliary.values()):
            assert term.raw.dtype == torch.float32
        for named in output["plans"]:
            plan = named.plan
            assert plan.logits_TE.dtype == plan.probs_TE.dtype == plan.weight_N.dtype == torch.float32
    found = dtypes(module)
    trunk = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert found.pop("router") == {torch.float32}
    assert all(dtype == {trunk} for dtype in found.values()), found


def test_router_weights_keep_the_bits_that_bf16_has_not() -> None:
    # cast to bf16 and back they would start from other values than in fp32
    module, fitting = VisionLanguageModule(small_vl_moe()), trainer("bf16-true")
    expected = {name: tensor.clone() for name, tensor in module.backbone.state_dict().items()}
    module.trainer = fitting
    fitting.strategy.connect(module)
    module.setup("fit")
    assert isinstance(fitting.precision_plugin, RegionHalfPrecision)
    converted = fitting.precision_plugin.convert_module(module).backbone.state_dict()
    for name, tensor in expected.items():
        if "router" in name:
            assert torch.equal(converted[name], tensor) and not torch.equal(tensor, tensor.bfloat16().float())
        else:
            assert torch.equal(converted[name], tensor.bfloat16())


@pytest.mark.parametrize(
    ("policy", "fp32"),
    [
        (PrecisionPolicy(), {"router"}),
        (PrecisionPolicy(router=None), set()),
        (PrecisionPolicy(norms="float32", experts="float32"), {"router", "norm", "experts"}),
        (PrecisionPolicy(heads="float32"), {"router", "objective"}),
        (PrecisionPolicy(trunk="float32"), {"router", "norm", "experts", "objective", "trunk"}),
    ],
    ids=["default", "router follows", "norms and experts", "heads", "everything"],
)
def test_a_pinned_region_trains_in_fp32_under_bf16_true(policy: PrecisionPolicy, fp32: set[str]) -> None:
    module, seen = VisionLanguageModule(small_vl_moe(), precision=policy), Plans()
    trainer("bf16-true", seen).fit(module, loader(2))
    assert all(bool(output["loss"].isfinite()) for output in seen.outputs)
    for part, found in dtypes(module).items():
        assert found == {torch.float32 if part in fp32 else torch.bfloat16}, part


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", "bfloat16"),
        ("bf16-mixed", "float32"),
        ("bf16-true", "float32"),
        # what the precision gives most regions by itself
        pytest.param("32-true", "float32", marks=pytest.mark.slow),
        pytest.param("bf16-mixed", "bfloat16", marks=pytest.mark.slow),
        pytest.param("bf16-true", "bfloat16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("region", ["router", "attention_logits", "norms", "experts", "heads", "losses"])
def test_every_region_trains_in_every_precision(precision: str, region: str, dtype: str) -> None:
    module, seen = VisionLanguageModule(small_vl_moe(), precision=PrecisionPolicy(**{region: dtype})), Plans()
    trainer(precision, seen, steps=1).fit(module, loader(1))
    assert bool(seen.outputs[0]["loss"].isfinite())
    assert all(named.plan.logits_TE.dtype == torch.float32 for named in seen.outputs[0]["plans"])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_norm_inside_experts_of_another_dtype_trains_under_bf16_true(dtype: str) -> None:
    # the hidden units have the experts' dtype, the norm on them that of the trunk
    backbone = small_vl_moe(stabilisers=ModelStabilisers(sub_norm=True, norm="layer"))
    module, seen = VisionLanguageModule(backbone, precision=PrecisionPolicy(experts=dtype)), Plans()
    trainer("bf16-true", seen, steps=1).fit(module, loader(1))
    assert bool(seen.outputs[0]["loss"].isfinite())


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("policy", [PrecisionPolicy(), PrecisionPolicy(router=None)], ids=["pinned", "free"])
def test_soft_slots_train_in_every_precision(precision: str, policy: PrecisionPolicy) -> None:
    module, seen = VisionLanguageModule(small_vl_moe(router=SoftRouter), precision=policy), Plans()
    trainer(precision, seen, steps=1).fit(module, loader(1))
    assert bool(seen.outputs[0]["loss"].isfinite())
    assert all(named.plan.logits_TE.dtype == torch.float32 for named in seen.outputs[0]["plans"])


class Told(SigmoidBiasRouter):
    """Keeps its counts."""

    told: list[Tensor]

    def rebalance(self, load_AE: Tensor, tally: Tensor) -> None:
        self.told = [*getattr(self, "told", []), load_AE]
        super().rebalance(load_AE, tally)


@pytest.mark.parametrize("precision", HALF)
def test_counts_are_exact_above_256(precision: str) -> None:
    # 100 texts of 7 tokens, as texts and in pairs, in two micro-batches: 2800 tokens to 1 of 2 experts each; bf16
    # counts to 256. The bias of an expert moves by 1e-3 once; the nearest bf16 is 0.00099945
    module = VisionLanguageModule(small_vl_moe(num_experts=2, router=partial(Told, top_k=1)))
    trainer(precision, steps=1, accumulate_grad_batches=2).fit(module, loader(2, num_samples=100))
    router = module.backbone.get_submodule("blocks.1.ffn.text.router")
    assert isinstance(router, Told)
    (load_E,) = router.told
    assert load_E.dtype == torch.int64 and int(load_E.sum()) == 2 * 2 * 700
    assert router.bias_AE.dtype == torch.float32
    assert float(router.bias_AE.abs().max()) == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize("precision", HALF)
def test_means_over_an_evaluation_epoch_are_exact_above_256_samples(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 50 batches of 8: sums in bf16 would stand still well before 400 samples
    seen: dict[str, list[float]] = {"task": [], "text": []}
    update = Evaluation.update

    def spy(self: Evaluation, output: ObjectiveOutput, *rest: Any) -> None:
        seen["task"].append(float(LossReport(output.terms, {}).task_loss))
        seen["text"].append(float(output.terms["text"].raw))
        update(self, output, *rest)

    monkeypatch.setattr(Evaluation, "update", spy)
    evaluating = trainer(precision)
    evaluating.validate(VisionLanguageModule(small_vl_moe()), loader(50, num_samples=8), verbose=False)
    for key, values in (("val/task_loss", seen["task"]), ("val_loss/text", seen["text"])):
        assert float(evaluating.callback_metrics[key]) == pytest.approx(sum(values) / 50, rel=1e-6)


def test_a_strategy_that_casts_every_weight_is_refused() -> None:
    module, fitting = VisionLanguageModule(small_vl_moe()), trainer("32-true")
    fitting.strategy.precision_plugin = FSDPPrecision("bf16-true")
    module.trainer = fitting
    with pytest.raises(
        UserError, match=r"FSDPPrecision casts every weight.*\(router\); set trainer.precision to bf16-mixed"
    ):
        module.setup("fit")


def test_fp32_optimiser_state_needs_fp32_parameters() -> None:
    module = VisionLanguageModule(small_vl_moe(), precision=PrecisionPolicy(optimizer_state="float32"))
    with pytest.raises(UserError, match=r"optimizer_state is float32 with trainer.precision bf16-true"):
        trainer("bf16-true").fit(module, loader(1))


@pytest.mark.parametrize("region", ["heads", "trunk"])
def test_the_other_half_precision_is_refused(region: str) -> None:
    module = VisionLanguageModule(small_vl_moe(), precision=PrecisionPolicy(**{region: "float16"}))
    with pytest.raises(
        UserError, match=rf"precision.{region} is float16, but weights under bf16-true are bfl.* 16-true"
    ):
        trainer("bf16-true").fit(module, loader(1))


def test_simulated_optimiser_state_holds_numbers_of_its_format() -> None:
    policy = PrecisionPolicy(optimizer_state="bfloat16", simulate=Simulation())
    module = VisionLanguageModule(small_vl_moe(), precision=policy)
    fitting = trainer("32-true")
    fitting.fit(module, loader(2))
    states = [value for state in fitting.optimizers[0].state.values() for value in state.values() if value.numel() > 1]
    assert len(states) > 20
    assert all(torch.equal(value, value.bfloat16().float()) for value in states)
    plain = trainer("32-true")
    plain.fit(VisionLanguageModule(small_vl_moe()), loader(2))
    free = [value for state in plain.optimizers[0].state.values() for value in state.values() if value.numel() > 1]
    assert not all(torch.equal(value, value.bfloat16().float()) for value in free)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-mixed"])
def test_contracts_on_a_gpu(precision: str) -> None:
    module, seen = VisionLanguageModule(small_vl_moe(top_k=2)), Plans()
    Trainer(
        accelerator="gpu", devices=1, precision=precision, max_steps=2, callbacks=[seen], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
    ).fit(module, loader(2))  # fmt: skip
    assert dtypes(module)["router"] == {torch.float32}
    for output in seen.outputs:
        assert output["loss"].dtype == torch.float32 and bool(output["loss"].isfinite())
        assert all(named.plan.logits_TE.dtype == torch.float32 for named in output["plans"])


@pytest.mark.slow  # a whole run of bf16-true by the command line is below, one of 32-true in test_fit.py
@pytest.mark.parametrize("precision", PRECISIONS)
def test_fast_dev_run_on_the_command_line(precision: str, moevlm: Moevlm) -> None:
    moevlm("fit", *SMALL, f"--trainer.precision={precision}", "--trainer.fast_dev_run=true")


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_checkpoint_and_resume_keep_dtypes_and_values(precision: str, moevlm: Moevlm, workplace: Path) -> None:
    chosen = f"--trainer.precision={precision}"
    moevlm("fit", *SMALL, *budget(4, val_every=2), chosen)
    whole = last_checkpoint(workplace).rename(workplace / "whole.ckpt")
    moevlm("fit", *SMALL, *budget(2, total=4), chosen)
    half = last_checkpoint(workplace).rename(workplace / "half.ckpt")
    moevlm("fit", *SMALL, *budget(4, val_every=2), chosen, "--ckpt_path", str(half))
    one, two = (torch.load(path, weights_only=True) for path in (whole, last_checkpoint(workplace)))
    trunk = torch.bfloat16 if precision == "bf16-true" else torch.float32
    routers = 0
    for name, tensor in one["state_dict"].items():
        if name.startswith(("backbone", "objective")):
            assert tensor.dtype == (torch.float32 if "router" in name else trunk), name
            routers += "router" in name
        assert torch.equal(tensor, two["state_dict"][name]) and tensor.dtype == two["state_dict"][name].dtype, name
    assert routers == 2
    for index, state in one["optimizer_states"][0]["state"].items():
        for name, value in state.items():
            again = two["optimizer_states"][0]["state"][index][name]
            assert torch.equal(value, again) and value.dtype == again.dtype, (index, name)
