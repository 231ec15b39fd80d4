"""Schedules by hand, and who is decayed."""

import math

import pytest
import torch

from lightning_moevlm.errors import UserError
from lightning_moevlm.optim import WarmupCosine, parameter_groups
from tests.small_model import small_vl_moe


def test_warmup_then_half_cosine_by_hand() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = WarmupCosine(optimizer, total_steps=12, warmup=1 / 3, final_ratio=0.1)
    rates = []
    for _ in range(14):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[4] == pytest.approx(2.0)
    assert rates[8] == pytest.approx(2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5))))
    assert rates[12] == rates[13] == pytest.approx(0.2)


def test_schedule_state_round_trip() -> None:
    def build() -> tuple[torch.optim.Optimizer, WarmupCosine]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, WarmupCosine(optimizer, total_steps=10, warmup=0.2)

    optimizer, schedule = build()
    for _ in range(5):
        optimizer.step()
        schedule.step()
    other_optimizer, other = build()
    other.load_state_dict(schedule.state_dict())
    other_optimizer.load_state_dict(optimizer.state_dict())
    assert other_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    schedule.step()
    other.step()
    assert other.get_last_lr() == schedule.get_last_lr()


def test_a_checkpoint_does_not_bring_its_budget_along() -> None:
    # resumed with ten times the budget, training must not go on at the floor of the old schedule
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    short = WarmupCosine(optimizer, total_steps=100, warmup=0.0)
    for _ in range(100):
        optimizer.step()
        short.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    longer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = WarmupCosine(longer, total_steps=1000, warmup=0.0)
    schedule.load_state_dict(short.state_dict())
    expected = 2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.1)))
    assert longer.param_groups[0]["lr"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "total_steps of the schedule is 0"),
        ({"total_steps": 10, "warmup": 20}, "warmup of the schedule is 20: choose a share"),
    ],
)
def test_impossible_schedules_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        WarmupCosine(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), **options)


def test_matrices_are_decayed_and_nothing_else() -> None:
    model = small_vl_moe()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, undecayed = parameter_groups(model.named_parameters())
    assert "weight_decay" not in decayed and undecayed["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(undecayed["params"]) == len(names)
    kinds = {names[id(parameter)].split(".")[-2:][0] for parameter in decayed["params"]}
    assert kinds == {"project", "query_key_value", "out", "up", "down", "experts"}
    assert any("router" in names[id(parameter)] for parameter in undecayed["params"])


def test_frozen_parameters_are_left_out() -> None:
    model = small_vl_moe()
    for parameter in model.text.parameters():
        parameter.requires_grad_(False)
    grouped = {id(parameter) for group in parameter_groups(model.named_parameters()) for parameter in group["params"]}
    assert not any(id(parameter) in grouped for parameter in model.text.parameters())
