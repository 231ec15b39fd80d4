"""Budgets by hand: the steps that samples and FLOPs allow, minutes as Lightning's text, and refusals."""

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.flat_config import flatten_values
from lightning_moevlm.study.declare.budget import Budget, samples_per_step
from lightning_moevlm.study.declare.study_file import read_study
from lightning_moevlm.study.plan.plan_study import plan_study
from tests.study.tiny_study import Card, plan_of, resolve, write_project

CARD = Card(1_000_000, 400_000, 12_000_000)


def config(batch_size: int, **trainer: object) -> dict:
    return {"data": {"batch_size": batch_size}, "trainer": {"devices": "auto", **trainer}}


@pytest.mark.parametrize(
    ("trainer", "samples"),
    [
        ({}, 32),
        ({"accumulate_grad_batches": 4}, 128),
        ({"devices": 2, "num_nodes": 3, "accumulate_grad_batches": 4}, 32 * 2 * 3 * 4),
        ({"devices": [0, 3]}, 64),
        ({"devices": "0,1,3"}, 96),
        ({"devices": "4"}, 128),
        ({"devices": -1}, 32),  # all that a run sees: a sweep shows each run one
    ],
)
def test_samples_per_step(trainer, samples):
    assert samples_per_step(config(32, **trainer)) == samples


def test_steps_by_hand():
    assert Budget(samples=1000).steps(config(32), CARD) == 31  # 31 x 32 = 992
    # one step: 3 x 12e6 x 32 = 1.152e9 FLOPs; 1e11 / 1.152e9 = 86.8
    assert Budget(active_flops=1e11).steps(config(32), CARD) == 86
    with pytest.raises(UserError, match="budget of 31 samples is less than one step, which takes 32 samples"):
        Budget(samples=31).steps(config(32), CARD)
    with pytest.raises(UserError, match=r"1e\+09 active FLOPs is less than one step, which takes 1\.152e\+09"):
        Budget(active_flops=1e9).steps(config(32), CARD)


def test_minutes_by_hand():
    assert Budget(minutes=1.5).max_time == "00:00:01:30"
    assert Budget(minutes=2 * 24 * 60 + 61).max_time == "02:01:01:00"


def test_words():
    budgets = [Budget(60), Budget(samples=2000), Budget(active_flops=2.5e12), Budget(minutes=0.5)]
    assert [budget.text for budget in budgets] == ["60 steps", "2,000 samples", "2.5e+12 active FLOPs", "0.5 minutes"]


def project(tmp_path, budget: dict, **study: object):
    file = write_project(tmp_path, "sqlite:///x.db", {"budget": budget, **study})
    base = tmp_path / "base.yaml"
    base.write_text(base.read_text() + "data: {batch_size: 4}\n")
    return file


def test_samples_give_each_arm_its_steps(tmp_path):
    arms = {"baseline": None, "accumulating": {"trainer.accumulate_grad_batches": 2}}
    plan = plan_of(project(tmp_path, {"samples": 40}, arms=arms))
    assert {run.arm: run.max_steps for run in plan.runs} == {"baseline": 10, "accumulating": 5}
    assert [run.resolved["trainer"]["max_steps"] for run in plan.runs] == [10, 10, 5, 5]


def test_flops_give_each_arm_the_steps_of_its_model(tmp_path):
    def describe(resolved: dict) -> Card:
        return Card(1, 1, 100 if resolved["model"]["speed"] == 0.5 else 200)

    file = project(tmp_path, {"active_flops": 12_000})
    plan = plan_study(read_study(file), resolve, describe, tmp_path / "sweeps")
    # 3 x 100 x 4 = 1,200 FLOPs a step, and 2,400 of the other model
    assert {run.arm: run.max_steps for run in plan.runs} == {"baseline": 10, "fast": 5}


def test_minutes_leave_the_steps_open(tmp_path):
    run = plan_of(project(tmp_path, {"minutes": 2})).runs[0]
    assert run.max_steps is None
    told = {key: value for key, value in flatten_values(run.overrides).items() if key.startswith("trainer.max")}
    assert told == {"trainer.max_steps": -1, "trainer.max_epochs": -1, "trainer.max_time": "00:00:02:00"}


def test_minutes_need_a_schedule_of_known_length(tmp_path):
    file = project(tmp_path, {"minutes": 2})
    base = tmp_path / "base.yaml"
    text = base.read_text().replace(
        "model:\n", "model:\n  schedule: {init_args: {total_steps: '${trainer.max_steps}'}}\n"
    )
    base.write_text(text)
    with pytest.raises(UserError, match=r"schedule follows trainer\.max_steps; set `model\.schedule"):
        plan_of(file)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({}, "exactly one of max_steps, samples, active_flops, minutes; got none"),
        ({"max_steps": 3, "samples": 4}, "exactly one .* got max_steps, samples"),
        ({"sample": 4}, "did you mean 'samples'"),
        ({"samples": 0}, "whole number >= 1"),
        ({"active_flops": 0}, "a number > 0"),
        ({"minutes": 0.001}, "less than a second"),
    ],
)
def test_refusals(tmp_path, budget, words):
    with pytest.raises(UserError, match=rf"tiny\.yaml:\d+: budget.*{words}"):
        plan_of(project(tmp_path, budget))


def test_less_than_a_step_names_the_arm(tmp_path):
    with pytest.raises(UserError, match=r"tiny\.yaml:\d+: arm 'baseline': a budget of 3 samples is less than one step"):
        plan_of(project(tmp_path, {"samples": 3}))


def test_unequal_flops_are_refused_where_they_should_match(tmp_path):
    def describe(flops: int):
        return lambda resolved: Card(1, 1, 10_000 if resolved["model"]["speed"] == 0.5 else flops)

    study = read_study(project(tmp_path, {"max_steps": 4}, match="active_flops"))
    # 1 % of 10,000 is 100
    assert plan_study(study, resolve, describe(9_900), tmp_path).runs
    with pytest.raises(UserError, match=r"arm 'fast' has 10,101 active FLOPs per sample, \+1\.01 % against the 10,000"):
        plan_study(study, resolve, describe(10_101), tmp_path)
    with pytest.raises(UserError, match=r"-50 % .* change hidden_dim, top_k .* or remove `match`"):
        plan_study(study, resolve, describe(5_000), tmp_path)
    unmatched = read_study(project(tmp_path, {"max_steps": 4}))
    assert plan_study(unmatched, resolve, describe(5_000), tmp_path).runs
    with pytest.raises(UserError, match="match: got 'active_flop'; did you mean 'active_flops'"):
        read_study(project(tmp_path, {"max_steps": 4}, match="active_flop"))
