"""Who is decayed, at which rate who learns, and that everybody is in one group."""

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_moevlm.errors import UserError
from lightning_moevlm.optim import GroupOptions, Lion, MuonAdamW, StableAdamW, WarmupLinear, parameter_groups
from lightning_moevlm.training import VisionLanguageModule
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
