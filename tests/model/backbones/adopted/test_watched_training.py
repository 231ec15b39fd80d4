"""What watches and moves routing does so on adopted models: ranks, recorder, shadow, frozen choices, actions."""

import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'lightning-moevlm[hf]'")

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.model.objectives import NextToken
from lightning_moevlm.model.precision import PrecisionPolicy
from lightning_moevlm.model.routers import TopKRouter
from lightning_moevlm.tracking.recordings.recording import read_recording
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.actions import Actions, AnticipateRouting, ReviveDeadExperts
from lightning_moevlm.training.callbacks import DivergenceGuard, FlightRecorder, Liveness, PrecisionShadow, Telemetry
from lightning_moevlm.training.callbacks.recording.frozen_routing import FrozenRouting
from tests.model.backbones.adopted.adopted_ranks import results
from tests.model.backbones.adopted.small_hugging_face import DEEPSEEK, OLMOE, QWEN, TEXT, small_hugging_face
from tests.small_model import pair_batch
from tests.training.small_fit import Poison, fit

ERNIE_TEXT: dict[str, Any] = {name: TEXT[name] for name in TEXT if "expert" not in name} | {
    "model_type": "ernie4_5_moe", "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1,
    "moe_layer_start_index": 0, "moe_layer_end_index": 1, "moe_layer_interval": 1,
}  # fmt: skip


def module_of(
    config: dict[str, Any] = QWEN,
    actions: Actions = Actions(),
    precision: PrecisionPolicy = PrecisionPolicy(),
    **options: Any,
) -> VisionLanguageModule:
    return VisionLanguageModule(
        small_hugging_face(config, **options), NextToken, optimizer=partial(AdamW, lr=1e-2), actions=actions,
        precision=precision,
    )  # fmt: skip


def weights(module: VisionLanguageModule) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.slow  # two processes
def test_two_ranks_train_like_one(tmp_path: Path) -> None:
    """One step of plain SGD: equal weights are equal gradients, of the task and of losses on plans."""
    found = tmp_path / "two.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.model.backbones.adopted.adopted_ranks", str(found)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=290, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    two, one = torch.load(found, weights_only=True), results(0, 1)
    start = small_hugging_face(QWEN).state_dict()
    for case, values in one.items():
        for name, value in values.items():
            torch.testing.assert_close(two[case][name], value, msg=lambda text, c=case, n=name: f"{c}, {n}: {text}")
        moved = [name for name in values if name.startswith("backbone.") and name.removeprefix("backbone.") in start]
        if case != "bias":
            assert any(not torch.equal(values[name], start[name.removeprefix("backbone.")]) for name in moved)
    assert any(bool(bias.any()) for bias in one["bias"].values())


def test_the_recorder_keeps_what_routers_did_and_changes_nothing(tmp_path: Path) -> None:
    batches = [pair_batch(seed=seed) for seed in range(6)]

    def train(folder: Path, *faults: Any) -> VisionLanguageModule:
        module = module_of()
        recorder = FlightRecorder(keep=64, every_n_steps=4, attention_every=5)
        watchers = [Telemetry(), *faults, recorder] if folder != tmp_path / "none" else []
        fit(module, 6, batches=batches, callbacks=watchers, default_root_dir=folder)
        return module

    assert torch.equal(weights(train(tmp_path / "none")), weights(train(tmp_path / "quiet")))
    assert not list((tmp_path / "quiet").glob("recordings/*"))
    train(tmp_path / "poisoned", Poison(4), DivergenceGuard(10))
    (file,) = (tmp_path / "poisoned").glob("recordings/*")
    recording = read_recording(file)
    assert recording.events[0].kind == "not finite" and recording.events[0].step == 4
    values = recording.steps[1].values
    path = module_of().backbone.layers[0].path  # type: ignore[union-attr, index]
    loads = [value for name, value in values.items() if name.startswith(f"load/backbone.{path}/pair/")]
    assert len(loads) == 4
    assert sum(loads) == pytest.approx(1.0)
    assert values[f"router_logit/backbone.{path}/pair"] > 0
    assert any(name.startswith("gradient_norm/") and ".gate" in name for name in values)


@pytest.mark.parametrize(
    ("config", "sum_of_weights"),
    [(QWEN, 1.0), (DEEPSEEK, 2.5), (QWEN | {"dtype": "bfloat16"}, 1.0)],
    ids=["images", "scaled weights", "narrow weights"],
)
def test_earlier_weights_choose_while_the_current_ones_learn(config: dict[str, Any], sum_of_weights: float) -> None:
    batch = pair_batch() if "vision_config" in config else Batch(None, *pair_batch()[1:4])
    options = {"dtype": config["dtype"]} if "dtype" in config else {}
    free, frozen = module_of(config, **options), module_of(config, **options)
    outputs = fit(frozen, 3, batches=[batch] * 3, callbacks=[FrozenRouting(1)]).outputs
    fit(free, 3, batches=[batch] * 3)
    first, last = (outputs[step]["plans"][0].plan for step in (0, 2))
    assert torch.equal(first.expert_N, last.expert_N)
    assert not torch.equal(first.weight_N, last.weight_N)
    for plan in (first, last):
        sum_T = plan.weight_N.view(2, -1).sum(dim=0)
        torch.testing.assert_close(
            sum_T[plan.valid_T], torch.full_like(sum_T, sum_of_weights)[plan.valid_T], rtol=1e-2, atol=0
        )
        assert float(plan.weight_N.max()) < sum_of_weights  # on padding too, which runs
    assert not torch.equal(weights(free), weights(frozen))


def test_the_shadow_measures_a_narrow_model() -> None:
    found = {}
    for dtype in ("float32", "bfloat16"):
        module = module_of(dtype=dtype)
        points = fit(module, 1, batches=[pair_batch()], callbacks=[PrecisionShadow(every_n_steps=1)]).points
        found[dtype] = {key: dict(values)[1] for key, values in points.items() if key.startswith("shadow_logit_error")}
    assert found["float32"].keys() == found["bfloat16"].keys()
    assert set(found["float32"].values()) == {0.0}
    assert all(0 < value < 1 for value in found["bfloat16"].values())


def test_a_dtype_of_routers_reaches_ours_alone() -> None:
    """Their routers compute in a dtype of their own, which no policy changes."""
    found = []
    for router, dtype in ((None, "bfloat16"), (None, "float32"), (TopKRouter, "bfloat16"), (TopKRouter, "float32")):
        options = {} if router is None else {"router": partial(TopKRouter, top_k=2)}
        if router is None and dtype == "bfloat16":
            with pytest.raises(UserError, match="bfloat16 reaches no router of transformers"):
                module_of(OLMOE, precision=PrecisionPolicy(router=dtype))
            continue
        module = module_of(OLMOE, precision=PrecisionPolicy(router=dtype), **options)  # type: ignore[arg-type]
        found.append(module.backbone(None, *pair_batch()[1:3]).plans[0].plan)
    theirs, narrow, ours = found
    torch.testing.assert_close(ours.logits_TE, theirs.logits_TE)
    assert not torch.equal(narrow.logits_TE, ours.logits_TE)
    torch.testing.assert_close(narrow.logits_TE, ours.logits_TE, rtol=0, atol=2e-2)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("config", [QWEN, DEEPSEEK, ERNIE_TEXT], ids=["qwen3_vl_moe", "deepseek_v3", "ernie4_5_moe"])
def test_half_precisions_of_the_trainer_train_them(config: dict[str, Any], precision: str, tmp_path: Path) -> None:
    """Receipts compare dtypes of regions, which change no router of theirs."""
    module = module_of(config)
    watchers = [Telemetry(), Liveness(every_n_steps=1), FlightRecorder(every_n_steps=1)]
    batch = pair_batch() if config is QWEN else pair_batch()._replace(images_BRYX=None)
    points = fit(
        module, 2, batches=[batch] * 2, callbacks=watchers, precision=precision, default_root_dir=tmp_path
    ).points
    assert all(math.isfinite(value) for _, value in points["train/task_loss"])
    # ERNIE's gates are fp32 in models of any dtype
    own = torch.bfloat16 if precision == "bf16-true" and config is not ERNIE_TEXT else torch.float32
    theirs = {name: each.dtype for name, each in module.named_parameters() if ".router.theirs." in name}
    assert theirs and set(theirs.values()) == {own}
    moved = {name: each.dtype for name, each in module.named_buffers() if name.endswith("correction_bias")}
    assert set(moved.values()) <= {torch.float32} and (moved or config is not DEEPSEEK)


def test_actions_on_their_parts_are_refused_where_they_cannot_act() -> None:
    for options, actions, message in (
        ({}, Actions(anticipate_routing=AnticipateRouting()), "cannot act with TheirRouter"),
        ({}, Actions(revive_dead_experts=ReviveDeadExperts()), "of HuggingFaceModel belong to transformers"),
        ({"router": TopKRouter}, Actions(revive_dead_experts=ReviveDeadExperts()), "belong to transformers"),
    ):
        with pytest.raises(UserError, match=message):
            module_of(OLMOE, actions, **options)  # type: ignore[arg-type]


def test_choices_of_earlier_routers_of_ours_act() -> None:
    batch = Batch(None, *pair_batch()[1:4])
    module = module_of(
        OLMOE,
        Actions(anticipate_routing=AnticipateRouting(delay=1, num_steps=None)),
        router=partial(TopKRouter, top_k=2),
    )
    fit(module, 3, batches=[batch] * 3)
    assert module.backbone.layers[0].choose is not None  # type: ignore[union-attr, index]


def test_their_own_bias_is_moved_towards_even_loads() -> None:
    batch = Batch(None, *pair_batch()[1:4])
    module = module_of(DEEPSEEK, bias_rate=0.1)
    outputs = fit(module, 1, batches=[batch]).outputs
    (layer,) = module.backbone.layers  # type: ignore[union-attr]
    load_E = outputs[0]["plans"][0].plan.chosen_loads()[0].float()
    (bias_E,) = [value for name, value in layer.router.theirs.named_buffers() if name.endswith("_bias")]
    torch.testing.assert_close(bias_E, 0.1 * (load_E.mean() - load_E).sign())
