"""Training through the public command line, on real shards, into a real store."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.data.format.manifest import read_manifest
from tests.conftest import last_checkpoint, run_in, runs
from tests.small_run import BACKBONE, SMALL, budget

Moevlm = Callable[..., str]


def history(workplace: Path, run: Run, key: str) -> list[tuple[int, float]]:
    client = MlflowClient(f"sqlite:///{workplace}/runs/mlflow.db")
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)]


@pytest.fixture(scope="module")
def trained(shared_workplace: Path) -> Path:
    """A workplace in which ten steps were trained, validated every fourth; to be read only."""
    run_in(shared_workplace, "fit", *SMALL, *budget(10, val_every=4))
    return shared_workplace


def test_steps_are_logged_and_kept(trained: Path) -> None:
    (run,) = runs(trained)
    assert run.info.status == "FINISHED"
    # 0 is the untrained model; the last step is validated whatever the interval: a study would otherwise take an
    # earlier point for the result
    assert [step for step, _ in history(trained, run, "val/task_loss")] == [0, 4, 8, 10]
    assert [step for step, _ in history(trained, run, "train/task_loss")] == list(range(1, 11))
    logged = set(run.data.metrics)
    for key in (
        "loss/text",
        "loss_weighted/router_z",
        "load/block1/image/expert3",
        "load_entropy/block1/text",
        "token_entropy/block1/image",
        "max_violation/block1/text",
        "drop_rate/block1/image",
        "dead_experts/block1/text",
        "router_logit_max/block1/image",
        "optim/grad_norm",
        "throughput/samples_per_second",
        "throughput/tokens_per_second",
        "throughput/cpu_seconds_per_step",
        "throughput/data_wait",
        "val/accuracy_pair_text",
        "val/majority_text",
        "model/active_flops_per_sample",
    ):
        assert key in logged, key
    undeclared = {key for key in logged if metric_keys.find_metric(key) is None and not key.startswith("system/")}
    assert undeclared == set()
    assert run.data.tags["router_dtype"] == "float32"
    checkpoint = torch.load(last_checkpoint(trained), weights_only=True)
    assert checkpoint["global_step"] == 10


def test_terms_add_up_and_auxiliary_ones_stay_out_of_the_task_loss(trained: Path) -> None:
    # open_lm pull request 255: the auxiliary loss was inside the reported loss
    (run,) = runs(trained)
    value = run.data.metrics
    task = sum(value[f"loss_weighted/{term}"] for term in ("text", "image", "pair_text", "pair_image"))
    auxiliary = sum(value[f"loss_weighted/{term}"] for term in ("load_balance", "router_z"))
    assert value["train/task_loss"] == pytest.approx(task, rel=1e-5)
    assert value["train/total_loss"] == pytest.approx(task + auxiliary, rel=1e-5)
    assert value["loss_weighted/router_z"] == pytest.approx(1e-3 * value["loss/router_z"], rel=1e-5)


@pytest.mark.slow  # test_resume.py resumes in process; test_stabilised_fit.py by the command line
def test_resumed_equals_uninterrupted_bit_for_bit(moevlm: Moevlm, workplace: Path) -> None:
    moevlm("fit", *SMALL, *budget(22, val_every=11))
    whole = last_checkpoint(workplace).rename(workplace / "whole.ckpt")
    moevlm("fit", *SMALL, *budget(11, total=22))  # 14 batches an epoch: stops within the first, ends in the second
    half = last_checkpoint(workplace).rename(workplace / "half.ckpt")
    moevlm("fit", *SMALL, *budget(22, val_every=11), "--ckpt_path", str(half))
    resumed = last_checkpoint(workplace)
    one, two = (torch.load(path, weights_only=True) for path in (whole, resumed))
    assert one["global_step"] == two["global_step"] == 22
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, two["state_dict"][name]), name
    for index, state in one["optimizer_states"][0]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, two["optimizer_states"][0]["state"][index][name]), (index, name)
    first, _, third = runs(workplace)
    late = [point for point in history(workplace, first, "train/task_loss") if point[0] > 11]
    assert late and history(workplace, third, "train/task_loss") == late


def test_a_checkpoint_does_not_configure(moevlm: Moevlm, trained: Path, workplace: Path) -> None:
    # Lightning issue 21455: hyperparameters of a checkpoint overwrote the command line; and torch puts weight decay
    # back with the moments
    moevlm(
        "fit",
        *SMALL,
        *budget(11, total=12),
        "--ckpt_path",
        str(last_checkpoint(trained)),
        "--model.losses.router_z.weight=0.5",
        "--model.optimizer.init_args.weight_decay=0.7",
        "--model.groups.router_lr_multiplier=0.5",
    )
    metrics = runs(workplace)[-1].data.metrics
    assert metrics["loss_weighted/router_z"] == pytest.approx(0.5 * metrics["loss/router_z"], rel=1e-5)
    groups = torch.load(last_checkpoint(workplace), weights_only=True)["optimizer_states"][0]["param_groups"]
    by_role = {group["role"]: group for group in groups}
    assert by_role["matrix"]["weight_decay"] == 0.7 and by_role["router"]["weight_decay"] == 0.0
    assert by_role["router"]["lr"] == pytest.approx(0.5 * by_role["matrix"]["lr"])


def test_arms_share_data_order_and_masks(moevlm: Moevlm, trained: Path, workplace: Path) -> None:
    # before the first update, equal samples and equal masks give equal losses where the model is the same
    moevlm("fit", *SMALL, *budget(1), "--model.losses.load_balance=null")
    moevlm("fit", *SMALL, *budget(1), "--seed_everything=1")
    base, arm, other_seed = (
        [history(folder, run, key)[0] for key in ("loss/text", "loss/image")]
        for folder in (trained, workplace)
        for run in runs(folder)
    )
    assert base == arm
    assert base != other_seed


def test_validate_test_and_predict(moevlm: Moevlm, trained: Path, workplace: Path) -> None:
    checkpoint = str(last_checkpoint(trained))
    moevlm("validate", *SMALL, "--ckpt_path", checkpoint)
    moevlm("test", *SMALL, "--ckpt_path", checkpoint)
    (fitted,), (validated, tested) = runs(trained), runs(workplace)
    assert validated.data.metrics["val/task_loss"] == pytest.approx(fitted.data.metrics["val/task_loss"], rel=1e-6)
    assert "test/task_loss" in tested.data.metrics and "test/accuracy_text" in tested.data.metrics
    moevlm(
        "predict",
        *SMALL,
        "--ckpt_path",
        checkpoint,
        "--trainer.limit_predict_batches=1",
        "--trainer.logger=false",
        "--trainer.callbacks=[lightning_moevlm.training.callbacks.FeatureWriter]",
    )
    from safetensors import safe_open

    num_samples = read_manifest(workplace / "data/shards/scenes").num_samples("test")
    first = num_samples // math.ceil(num_samples / 8)  # batches are of nearly equal size, the first rounded down
    with safe_open(workplace / "runs/features/features-0000-000000.safetensors", "pt") as features:
        assert sorted(features.keys()) == ["image", "pair", "text"]
        assert features.get_tensor("pair").shape == (first, 16)
        assert len(features.metadata()["keys"].splitlines()) == first


def test_a_diverged_run_stops_and_names_the_step(moevlm: Moevlm, workplace: Path) -> None:
    options = ("--model.optimizer.init_args.lr=1e30", "--model.gradient.clip_norm=null")
    told = moevlm("fit", *SMALL, *budget(60), *options, code=3)
    (run,) = runs(workplace)
    losses = history(workplace, run, "train/task_loss")
    first = next(step for step, loss in losses if not math.isfinite(loss))
    assert first < 10 and run.data.metrics["stability/first_nonfinite_step"] == first
    assert told.splitlines()[-1] == f"moevlm: diverged: the training loss is not finite at step {first}"
    assert run.info.status == "FAILED"
    assert max(step for step, _ in history(workplace, run, "train/task_loss")) == 10
    assert not math.isfinite(history(workplace, run, "val/task_loss")[-1][1])  # torchmetrics would leave NaN out


def test_dense_twin_by_one_change(moevlm: Moevlm, trained: Path, workplace: Path) -> None:
    moevlm("fit", *SMALL, *budget(1), f"{BACKBONE}.sparse_modalities=[]")
    sparse, dense = (run.data.metrics for folder in (trained, workplace) for run in runs(folder))
    assert dense["model/active_flops_per_sample"] == pytest.approx(sparse["model/active_flops_per_sample"], rel=0.01)
    assert dense["model/total_parameters"] < sparse["model/total_parameters"]
    assert not any(key.startswith("load/") for key in dense)


ROUTER = f"{BACKBONE}.moe.init_args.router"


def test_loss_free_bias_moves_by_its_rate_once_per_step(moevlm: Moevlm, workplace: Path) -> None:
    # counted over both micro-batches of a step and both passes of a batch, and never twice
    options = (
        f"--model.backbone.init_args.moe.init_args.router={PACKAGE}.SigmoidBiasRouter",
        f"{ROUTER}.recentre=false",
    )
    moevlm("fit", *SMALL, *budget(3, val_every=6), *options, "--trainer.accumulate_grad_batches=2")
    state = torch.load(last_checkpoint(workplace), weights_only=True)["state_dict"]
    bias_E = state["backbone.blocks.1.ffn.image.router.bias_AE"]
    assert bool((bias_E != 0).any())
    steps_E = bias_E / 1e-3
    torch.testing.assert_close(steps_E, steps_E.round())  # three moves of -1, 0 or 1
    assert float(steps_E.abs().max()) <= 3


@pytest.mark.slow
def test_noise_of_a_router_is_drawn_again_after_a_resume(moevlm: Moevlm, workplace: Path) -> None:
    options = (f"{ROUTER}={PACKAGE}.NoisyTopKRouter", f"{ROUTER}.init_args.gate.jitter=0.1")
    moevlm("fit", *SMALL, *budget(4, val_every=2), *options)
    whole = last_checkpoint(workplace).rename(workplace / "whole.ckpt")
    moevlm("fit", *SMALL, *budget(2, total=4), *options)
    half = last_checkpoint(workplace).rename(workplace / "half.ckpt")
    moevlm("fit", *SMALL, *budget(4, val_every=2), *options, "--ckpt_path", str(half))
    one, two = (torch.load(path, weights_only=True)["state_dict"] for path in (whole, last_checkpoint(workplace)))
    assert all(torch.equal(one[name], two[name]) for name in one)


PACKAGE = "lightning_moevlm.model.routers"


def test_logged_learning_rate_is_the_one_of_the_step(trained: Path) -> None:
    (run,) = runs(trained)  # ten steps with a warm-up of 0.2: two steps, 1.5e-3 and 3e-3
    rates = dict(history(trained, run, "optim/learning_rate"))
    assert rates[1] == pytest.approx(1.5e-3) and rates[2] == rates[3] == pytest.approx(3e-3)
    assert rates[10] < rates[4]


def test_a_nested_option_and_the_progress_bar_can_be_turned_off(moevlm: Moevlm, workplace: Path) -> None:
    moevlm(
        "fit", *SMALL, *budget(1), f"{BACKBONE}.moe.init_args.capacity", "null", "--trainer.enable_progress_bar=false"
    )
    (run,) = runs(workplace)
    assert run.data.metrics["drop_rate/block1/text"] == 0.0


def test_functions_cannot_be_smuggled_in(moevlm: Moevlm, workplace: Path) -> None:
    for group in ("schedule", "optimizer", "objective"):
        smuggled = f'--model.{group}={{"class_path": "os.system", "init_args": {{"command": "touch PWNED"}}}}'
        moevlm("fit", *SMALL, *budget(1), smuggled, code=2)
    assert not (workplace / "PWNED").exists()


@pytest.mark.slow
def test_two_processes_train_one_run(workplace: Path) -> None:
    command = [sys.executable, "-m", "lightning_moevlm", "fit", *SMALL, *budget(4), "--trainer.accelerator=cpu"]
    command += ["--trainer.devices=2", "--trainer.strategy=ddp"]
    subprocess.run(command, cwd=workplace, check=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"})
    (run,) = runs(workplace)
    assert [step for step, _ in history(workplace, run, "val/task_loss")] == [0, 4]
