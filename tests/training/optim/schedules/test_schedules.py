"""Learning-rate schedules by hand."""

import math

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.training.optim import RateJump, WarmupCosine, WarmupLinear, WarmupSchedule, WarmupStableDecay

SCHEDULES = [WarmupCosine, WarmupLinear, WarmupStableDecay, RateJump]


def rates_of(schedule_class: type[WarmupSchedule], steps: int, *, peak: float = 2.0, **options: object) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = schedule_class(optimizer, **options)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_warmup_then_half_cosine_by_hand() -> None:
    rates = rates_of(WarmupCosine, 14, total_steps=12, warmup=1 / 3, final_ratio=0.1)
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[4] == pytest.approx(2.0)
    assert rates[8] == pytest.approx(2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5))))
    assert rates[12] == rates[13] == pytest.approx(0.2)


def test_warmup_then_a_line_by_hand() -> None:
    rates = rates_of(WarmupLinear, 14, total_steps=12, warmup=1 / 3, final_ratio=0.5)
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[4:] == pytest.approx([2.0, 1.875, 1.75, 1.625, 1.5, 1.375, 1.25, 1.125, 1.0, 1.0])  # 1 less in 8 steps


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
def test_warmup_stable_decay_by_hand(shape: str, half: float) -> None:
    # 10 steps: 2 up, 4 stable, 4 down
    rates = rates_of(WarmupStableDecay, 12, total_steps=10, warmup=0.2, decay=0.4, decay_shape=shape)
    assert rates[:2] == pytest.approx([1.0, 2.0])
    assert rates[2:7] == [2.0] * 5
    assert rates[8] == pytest.approx(2.0 * half)
    assert rates[10:] == [0.0, 0.0]


def test_without_decay_the_peak_stays() -> None:
    assert rates_of(WarmupStableDecay, 6, total_steps=4, warmup=0.5, decay=0.0) == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]


def test_a_jump_multiplies_the_rate_of_its_steps_alone() -> None:
    options = {"total_steps": 12, "warmup": 0.25, "final_ratio": 0.1}
    steady = rates_of(WarmupCosine, 14, **options)
    jumping = rates_of(RateJump, 14, begin=5, num_steps=2, jump=10.0, **options)
    assert jumping == pytest.approx([*steady[:5], 10 * steady[5], 10 * steady[6], *steady[7:]])


@pytest.mark.parametrize("schedule_class", SCHEDULES)
def test_every_group_follows_from_its_own_peak(schedule_class: type[WarmupSchedule]) -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (1.0, 0.1)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    schedule = schedule_class(optimizer, total_steps=8, warmup=0.25)
    for _ in range(10):
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert second == pytest.approx(0.1 * first)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("schedule_class", SCHEDULES)
def test_schedule_state_round_trip(schedule_class: type[WarmupSchedule]) -> None:
    def build() -> tuple[torch.optim.Optimizer, WarmupSchedule]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, schedule_class(optimizer, total_steps=10, warmup=0.2)

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
        ({"total_steps": 10, "warmup": 20}, "warmup of the schedule is 20: choose a value from 0"),
    ],
)
def test_impossible_schedules_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        WarmupCosine(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), **options)


def test_overlapping_warmup_and_decay_are_refused() -> None:
    with pytest.raises(UserError, match=r"warmup 0\.6 and decay 0\.6 of the schedule overlap"):
        rates_of(WarmupStableDecay, 1, total_steps=10, warmup=0.6, decay=0.6)
