"""Weight decay and learning rate of each group; every parameter is in exactly one."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.experts import MLPExperts
from lightning_moevlm.model.layers import MoEFFN
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.optim import (
    AdaGC,
    GradientControl,
    GradientStabilisers,
    GroupOptions,
    Lion,
    MuonAdamW,
    StableAdamW,
    WarmupLinear,
    parameter_groups,
)
from lightning_moevlm.training.optim.tensor_roles import is_stack
from tests.small_model import small_vl_moe


def build(options: GroupOptions, optimizer_class: type[Optimizer] = AdamW, **arguments: float) -> Optimizer:
    module = VisionLanguageModule(small_vl_moe())
    optimizer = optimizer_class(parameter_groups(module.named_parameters()), **arguments)
    options.apply(optimizer)
    return optimizer


def test_every_parameter_is_in_the_group_of_its_role() -> None:
    module = VisionLanguageModule(small_vl_moe())
    names = {id(parameter): name for name, parameter in module.named_parameters() if parameter.requires_grad}
    groups = parameter_groups(module.named_parameters())
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(members) == len(set(members)) and set(members) == set(names)
    kinds = {group["role"]: {names[id(parameter)].split(".")[-2] for parameter in group["params"]} for group in groups}
    assert kinds["matrix"] == {"query_key_value", "out", "up", "down"}
    assert kinds["edge"] == {"project", "0", "image_head"}  # 0 is the first layer of the text head
    assert kinds["router"] == {"router"} and kinds["expert"] == {"experts"}
    assert all(parameter.ndim == 3 for group in groups if group["role"] == "expert" for parameter in group["params"])
    assert {"text", "token", "patches", "norm"} < kinds["vector"]


def test_stacks_of_shared_experts_are_stacks_and_learn_as_the_trunk_does() -> None:
    moe = MoEFFN(6, 4, shared=partial(MLPExperts, hidden_dim=5), num_shared=2)
    groups = {
        group["role"]: group for group in parameter_groups((f"ffn.{name}", p) for name, p in moe.named_parameters())
    }
    assert set(groups) == {"router", "expert", "shared"}
    assert [p.shape for p in groups["shared"]["params"]] == [(2, 6, 5), (2, 5, 6)]
    assert is_stack(groups["shared"]) and is_stack(groups["expert"]) and not is_stack(groups["router"])
    optimizer = AdamW(groups.values(), lr=1.0, weight_decay=0.3)
    GroupOptions(expert_lr_multiplier=0.5).apply(optimizer)
    assert {group["role"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {
        "router": (1.0, 0.0), "expert": (0.5, 0.3), "shared": (1.0, 0.3)
    }  # fmt: skip


@pytest.mark.parametrize("rule", ["ada_gc", "clip_update", "StableAdamW"])
def test_rules_per_tensor_cut_the_spike_of_one_shared_expert_alone(rule: str) -> None:
    # the second expert's gradient is 100 times as large from the second step on: in one norm over the stack, the first
    # one's would be cut with it
    def learn(spike: float) -> Tensor:
        stack = nn.Parameter(torch.ones(2, 3, 3))
        groups = parameter_groups({"ffn.shared.up_EDF": stack}.items())
        optimizer = StableAdamW(groups, lr=0.1) if rule == "StableAdamW" else SGD(groups, lr=0.1)
        ada_gc = AdaGC(warmup_steps=1, warmup_norm=100.0) if rule == "ada_gc" else None
        clip_update = 2.0 if rule == "clip_update" else None
        control = GradientControl(GradientStabilisers(ada_gc=ada_gc, clip_update=clip_update), optimizer)
        for factor in (1.0, spike):
            stack.grad = torch.stack([torch.ones(3, 3), torch.full((3, 3), factor)])
            control.before_update(torch.tensor(0.0))
            optimizer.step()
            control.after_update()
        return stack.detach()

    calm, spiked = learn(1.0), learn(100.0)
    assert torch.equal(calm[0], spiked[0]) and not torch.equal(calm[1], spiked[1])


def test_matrices_are_decayed_and_nothing_else() -> None:
    optimizer = build(GroupOptions(), weight_decay=0.3)
    decay = {group["role"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decay == {"matrix": 0.3, "edge": 0.3, "expert": 0.3, "vector": 0.0, "router": 0.0}


def test_frozen_parameters_are_left_out() -> None:
    model = small_vl_moe()
    for parameter in model.text.parameters():
        parameter.requires_grad_(False)
    grouped = {id(parameter) for group in parameter_groups(model.named_parameters()) for parameter in group["params"]}
    assert not any(id(parameter) in grouped for parameter in model.text.parameters())


def test_a_dense_model_has_no_group_of_experts() -> None:
    groups = parameter_groups(small_vl_moe(sparse_modalities=()).named_parameters())
    assert {group["role"] for group in groups} == {"matrix", "vector", "edge"}


def test_routers_and_experts_have_rates_of_their_own_under_any_schedule() -> None:
    optimizer = build(GroupOptions(router_lr_multiplier=0.1, router_weight_decay=0.2, expert_lr_multiplier=2.0), lr=1.0)
    schedule = WarmupLinear(optimizer, total_steps=4, warmup=0.5)
    for factor in (0.5, 1.0, 1.0, 0.5, 0.0):  # two steps up, two down
        rates = {group["role"]: group["lr"] for group in optimizer.param_groups}
        assert rates == pytest.approx(
            {"matrix": factor, "edge": factor, "vector": factor, "router": 0.1 * factor, "expert": 2.0 * factor}
        )
        optimizer.step()
        schedule.step()
    assert next(group for group in optimizer.param_groups if group["role"] == "router")["weight_decay"] == 0.2


def test_a_multiplier_of_zero_freezes_routers() -> None:
    optimizer = build(GroupOptions(router_lr_multiplier=0.0, router_weight_decay=0.1), lr=1.0)
    (router,) = (group for group in optimizer.param_groups if group["role"] == "router")
    before = [parameter.detach().clone() for parameter in router["params"]]
    for parameter in router["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(map(torch.equal, before, router["params"]))


@pytest.mark.parametrize("optimizer_class", [AdamW, StableAdamW, Lion, MuonAdamW])
@pytest.mark.parametrize("peak", [0.01, 0.5])
def test_independent_decay_does_not_know_the_peak(optimizer_class: type[Optimizer], peak: float) -> None:
    # gradients of zero: the decay alone moves. Half way up a warm-up of 2 steps p (1 - 0.5 x 0.02), then p (1 - 0.02)
    optimizer = build(GroupOptions(independent_weight_decay=True), optimizer_class, lr=peak, weight_decay=0.02)
    schedule = WarmupLinear(optimizer, total_steps=4, warmup=0.5)
    for role in ("matrix", "expert"):
        (group,) = (group for group in optimizer.param_groups if group["role"] == role)
        for parameter in group["params"]:
            torch.nn.init.ones_(parameter)
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    schedule.step()
    assert_all(optimizer, 0.99)
    optimizer.step()
    assert_all(optimizer, 0.99 * 0.98)


def assert_all(optimizer: Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["role"] in ("matrix", "expert") else ():
            torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, value))


@pytest.mark.parametrize("optimizer_class", [SGD, Adam])
def test_independent_decay_is_refused_where_decay_goes_into_the_gradient(optimizer_class: type[Optimizer]) -> None:
    with pytest.raises(UserError, match=f"independent_weight_decay does not fit {optimizer_class.__name__}"):
        build(GroupOptions(independent_weight_decay=True), optimizer_class, lr=0.1, weight_decay=0.1)


def test_negative_multipliers_are_refused() -> None:
    with pytest.raises(UserError, match=r"groups\.expert_lr_multiplier is -1: choose 0 or more"):
        GroupOptions(expert_lr_multiplier=-1)
