"""Stability of a run against histories worked out by hand."""

import copy
import dataclasses
import math

import pytest

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.study.declare.budget import samples_per_step
from lightning_moevlm.study.statistics.equal_budget import StepCost, compute_step_cost, find_equal_budgets
from lightning_moevlm.study.statistics.lr_sensitivity import Ladder, find_ladders, largest_stable, sensitivity
from lightning_moevlm.study.statistics.outcomes.arm_stability import Recovery, summarise_stability
from lightning_moevlm.study.statistics.outcomes.stability import (
    TRAIN_LOSS,
    Series,
    dead_share,
    divergence_step,
    measure_stability,
    recovery,
    spikes,
    value_at,
)
from lightning_moevlm.study.statistics.paired_tests import fisher_p, mcnemar_p

# Mean 5, deviation 1 (population) of any even number of them.
EVEN = (4.0, 6.0)


def series(*values: float, every: int = 1) -> Series:
    return Series(tuple(every * (i + 1) for i in range(len(values))), values)


def test_spikes_lie_seven_deviations_away():
    # Ten points of mean 5 and deviation 1: 12 is exactly 7 away, 11.99 is not; so is -2 on the other side.
    assert spikes((*EVEN * 5, 12.0)).is_spike == (False,) * 10 + (True,)
    assert spikes((*EVEN * 5, 12.0)).score == 1.0  # one point had ten before it
    assert spikes((*EVEN * 5, -2.0)).score == 1.0
    assert spikes((*EVEN * 5, 11.99)).score == 0.0
    # The spike enters the next mean: 11 points, sum 62, mean 5.636; sum of squares 260 + 144 = 404, so deviation
    # sqrt(404 / 11 - 31.77) = 2.23 and a second 12 is only 2.9 away.
    assert spikes((*EVEN * 5, 12.0, 12.0)).score == pytest.approx(1 / 2)


def test_the_window_forgets():
    # Ten points far off, then ten of mean 5: in a window of ten only those count.
    values = (100.0,) * 10 + EVEN * 5 + (12.0,)
    assert spikes(values, window=10).is_spike[-1]
    assert not spikes(values, window=20).is_spike[-1]


def test_too_few_points_have_no_score():
    assert spikes((*EVEN * 4, 1e9)).score is None
    assert spikes(()).score is None
    assert measure_stability({}, has_diverged=False).spikes_loss is None


def test_a_non_finite_point_is_a_spike_and_enters_no_mean():
    found = spikes((math.nan, *EVEN * 5, math.inf, 6.0))
    assert found.is_spike == (False, *(False,) * 10, True, False)  # the first had nothing before it
    assert found.score == pytest.approx(1 / 2)


def test_a_constant_series_has_no_spikes():
    assert spikes((3.0,) * 20).score == 0.0


def test_recovery_is_from_the_spike_to_one_deviation_above_the_mean_before():
    # Logged every 10 steps. Spike at point 11 (step 110); 7 is above 5 + 1, 6 is not: back at step 130.
    assert recovery(series(*EVEN * 5, 12.0, 7.0, 6.0, 5.0, every=10)) == 20.0
    assert recovery(series(*EVEN * 5, 12.0, 7.0)) == math.inf
    assert recovery(series(*EVEN * 6)) == 0.0
    assert recovery(series(*EVEN * 5, -2.0, 5.0)) == 0.0  # a fall has nothing to recover from
    assert recovery(series(*EVEN)) is None
    assert recovery(None) is None
    tokens = measure_stability({TRAIN_LOSS: series(*EVEN * 5, 12.0, 6.0)}, has_diverged=False, tokens_per_step=100.0)
    assert (tokens.recovery_steps, tokens.recovery_tokens) == (1.0, 100.0)


def test_step_of_a_divergence():
    loss = series(3.0, math.nan, 3.0, every=5)
    assert divergence_step({TRAIN_LOSS: loss}) == 10
    guard = {metric_keys.FIRST_NONFINITE_STEP.key(): Series((10,), (7.0,))}
    assert divergence_step({TRAIN_LOSS: loss, **guard}) == 7  # the guard looks at every step, not at logged ones
    assert divergence_step({TRAIN_LOSS: series(3.0, 9.0)}) == 2  # it ended too high
    assert divergence_step({}) is None
    assert measure_stability({TRAIN_LOSS: loss}, has_diverged=False).diverged_at is None


def test_largest_logits_dead_experts_and_violation():
    logged = {
        metric_keys.ATTENTION_LOGIT_MAX.key(block=0): series(3.0, math.nan, 8.0),
        metric_keys.ATTENTION_LOGIT_MAX.key(block=1): series(4.0, 9.5),
        metric_keys.LOGIT_MAX.key(block=1, modality="text"): series(2.0, math.inf),
        metric_keys.LOG_PARTITION_MAX.key(term="text"): series(6.0, 5.0),
        metric_keys.MAX_VIOLATION.key(block=1, modality="text"): series(1.0, 2.0),
        metric_keys.MAX_VIOLATION.key(block=1, modality="image"): series(3.0, math.nan),
        metric_keys.BALANCE_GRADIENT_SHARE.key(weights="router"): series(0.5, 0.1, math.nan),
        metric_keys.BALANCE_GRADIENT_SHARE.key(weights="all"): series(0.01),
        # Steps 1 and 3 of four have a dead expert in one layer or the other.
        metric_keys.DEAD_EXPERTS.key(block=1, modality="text"): series(1.0, 0.0, 0.0, 0.0),
        metric_keys.DEAD_EXPERTS.key(block=1, modality="image"): series(0.0, 0.0, 2.0, 0.0),
    }
    found = measure_stability(logged, has_diverged=False)
    assert found.largest_attention_logit == 9.5
    assert found.largest_router_logit == math.inf
    assert found.largest_log_partition == 6.0
    assert found.max_violation == pytest.approx(2.0)  # (1 + 2 + 3) / 3
    assert found.dead_share == 0.5
    assert found.balance_share == pytest.approx(0.3)  # of routers: (0.5 + 0.1) / 2
    assert dead_share([]) is None


def test_arm_counts_stable_runs_and_compares_them():
    sound = measure_stability({TRAIN_LOSS: series(3.0)}, has_diverged=False)
    early, late = (measure_stability({TRAIN_LOSS: series(*(3.0,) * n, math.nan)}, has_diverged=True) for n in (2, 5))
    runs, survived = {0: late, 1: sound, 2: early}, {0: False, 1: True, 2: False}
    arm = summarise_stability(runs, survived, dict.fromkeys(range(3), True), 0.05)
    assert (arm.survival.stable, arm.survival.total, arm.first_divergence) == (1, 3, 3)
    # Two pairs differ, both against the arm: 2 of 4 ways of two coins are as extreme.
    assert (arm.test, arm.p) == ("McNemar", pytest.approx(0.5))
    # Exact ends for 1 of 3: P(>= 1) = 1 - (1 - p)^3 = 0.025, and P(<= 1) = (1 - p)^3 + 3 p (1 - p)^2 = 0.025.
    assert arm.interval == (pytest.approx(1 - 0.975 ** (1 / 3)), pytest.approx(0.9057, abs=1e-4))
    # Against other seeds, 1 of 3 and 3 of 3: the margins leave 2 failures of 6; both in this arm: C(3,2)/C(6,2) = 3/15,
    # both in the other as likely, one each 9/15; tables no likelier than this one: 3/15 + 3/15 = 0.4.
    unpaired = summarise_stability(runs, survived, dict.fromkeys(range(5, 8), True), 0.05)
    assert (unpaired.test, unpaired.p) == ("Fisher", pytest.approx(0.4))
    assert fisher_p(0, 3, 3, 3) == pytest.approx(2 / 20)  # C(6,3) = 20 ways, the two extreme ones
    assert fisher_p(0, 0, 3, 3) is None
    assert summarise_stability({0: sound}, {0: True}, None, 0.05).p is None
    assert arm.worst(lambda run: run.recovery_steps) is None  # too few points to call anything a spike
    assert arm.recovery == Recovery(0, 0, None, None)


def test_mcnemar_counts_pairs_that_differ():
    assert mcnemar_p(0, 3) == pytest.approx(2 / 8)  # three coins: the least p of three seeds
    assert mcnemar_p(6, 0) == pytest.approx(2 / 64)
    assert mcnemar_p(1, 4) == pytest.approx(2 * (1 + 5) / 32)
    assert mcnemar_p(0, 0) == 1.0


def test_time_to_recover_is_a_geometric_mean_with_its_interval():
    times = (10.0, 40.0, 0.0, math.inf)  # no spike in the third run; the fourth never came back
    sound = measure_stability({}, has_diverged=False)
    runs = {seed: dataclasses.replace(sound, recovery_steps=time) for seed, time in enumerate(times)}
    found = summarise_stability(runs, dict.fromkeys(runs, True), None, 0.05).recovery
    assert (found.spiked, found.recovered) == (3, 2)
    # Logarithms ln 20 -+ ln 2: deviation ln 2 sqrt(2), over sqrt(2) runs: half width t_{1, 0.975} ln 2 = 12.706 ln 2.
    assert found.steps == pytest.approx(20.0)
    assert found.interval.high / found.steps == pytest.approx(2**12.7062, rel=1e-4)


def test_value_between_points():
    curve = Series((0, 10, 20), (4.0, 2.0, math.nan))
    assert value_at(curve, 10) == 2.0
    assert value_at(curve, 2.5) == pytest.approx(3.5)  # a quarter of the way from 4 to 2
    assert value_at(curve, 15) is None
    assert value_at(curve, 21) is None
    assert value_at(Series((), ()), 0) is None


def test_equal_budgets_are_the_least_that_a_finished_run_spent():
    # Both go 20 steps; the second costs twice the FLOPs per step and the same tokens, and is half as fast.
    cheap, dear = Series((0, 10, 20), (8.0, 6.0, 4.0)), Series((0, 10, 20), (8.0, 5.0, 3.0))
    runs = [(StepCost(100.0, 1e6, 0.5), cheap), (StepCost(100.0, 2e6, 1.0), dear)]
    tokens, flops, seconds = find_equal_budgets(runs, [True, True])
    assert (tokens.what, tokens.spent, tokens.values) == ("tokens", 2000.0, (4.0, 3.0))
    assert (flops.spent, flops.values) == (2e7, (4.0, 5.0))  # the dear one was at step 10
    assert (seconds.spent, seconds.values) == (10.0, (4.0, 5.0))
    # A run that diverged at step 10 is not sound at the budget of the others, and does not shorten it.
    gone = (StepCost(100.0, 1e6, 0.5), Series((0, 10), (8.0, 9.0)))
    assert find_equal_budgets([runs[0], gone], [True, False])[0].values == (4.0, None)
    assert find_equal_budgets([(StepCost(None, 1e6, None), cheap)], [True])[0].what == "active FLOPs"
    assert find_equal_budgets([], []) == ()


def test_cost_of_a_step():
    config = {"data": {"batch_size": 8}, "trainer": {"accumulate_grad_batches": 4, "devices": "2", "num_nodes": 1}}
    assert samples_per_step(config) == 64
    assert samples_per_step({"data": {"batch_size": 8}, "trainer": {"devices": "auto"}}) == 8
    assert samples_per_step({"data": {"root": "x"}}) is None
    logged = {
        metric_keys.SAMPLES_PER_SECOND.key(): series(1.0, 32.0, 32.0),  # the first holds the warm-up
        metric_keys.TOKENS_PER_SECOND.key(): series(9.0, 640.0, 640.0),
    }
    # 64 samples of 20 tokens; 2 s at 32 samples/s.
    assert compute_step_cost(config, logged, flops_per_sample=10.0) == StepCost(1280.0, 640.0, 2.0)
    assert compute_step_cost(config, {}, flops_per_sample=10.0) == StepCost(None, 640.0, None)


def test_tokens_of_a_step_do_not_depend_on_the_clock():
    # Texts of 10, 20 and 30 tokens; the second run was held up in other intervals than the first.
    config = {"data": {"batch_size": 8}}
    tokens = []
    for rates in ((9.0, 32.0, 32.0, 16.0), (9.0, 16.0, 8.0, 32.0)):
        logged = {
            metric_keys.SAMPLES_PER_SECOND.key(): series(*rates),
            metric_keys.TOKENS_PER_SECOND.key(): series(*(r * t for r, t in zip(rates, (20, 10, 20, 30), strict=True))),
        }
        tokens.append(compute_step_cost(config, logged, None).tokens)
    assert tokens == [160.0, 160.0]  # 8 samples of (10 + 20 + 30) / 3
    # A rate that is no number, of an interval that took no time, is none.
    logged = {
        metric_keys.SAMPLES_PER_SECOND.key(): series(1.0, math.inf, 4.0, math.nan),
        metric_keys.TOKENS_PER_SECOND.key(): series(1.0, math.inf, 80.0, 5.0),
    }
    assert compute_step_cost(config, logged, None) == StepCost(160.0, None, 2.0)
    assert compute_step_cost(config, {metric_keys.SAMPLES_PER_SECOND.key(): series(math.nan)}, None).seconds is None


def test_sensitivity_by_hand():
    # Untrained 7: losses capped at 7, a divergence counts as 7. (5 + 4 + 7 + 7) / 4 - 4 = 1.75.
    losses = {1e-3: 5.0, 3e-3: 4.0, 1e-2: 9.0, 3e-2: math.nan}
    assert sensitivity(losses, untrained=7.0) == pytest.approx(1.75)
    assert sensitivity(dict.fromkeys(losses, 4.0), untrained=7.0) == 0.0
    assert sensitivity(dict.fromkeys(losses, math.inf), untrained=7.0) == 0.0  # stuck at the start: see the docstring
    assert sensitivity({}, untrained=7.0) is None
    assert sensitivity(losses, untrained=math.nan) is None


def test_largest_stable_rate_has_only_stable_ones_below():
    assert largest_stable({1e-2: True, 1e-3: True, 1e-1: False}) == 1e-2
    assert largest_stable({1e-3: True, 1e-2: False, 1e-1: True}) == 1e-3
    assert largest_stable({1e-3: False}) is None


def config(rate: float, qk_norm: bool | None = True) -> dict[str, object]:
    return {"model": {"qk_norm": qk_norm, "optimizer": {"class_path": "AdamW", "init_args": {"lr": rate}}}}


def test_ladders_are_arms_that_differ_in_the_rate_alone():
    configs = {
        "on_lr_1e-2": config(1e-2), "on_lr_1e-3": config(1e-3), "off_lr_1e-3": config(1e-3, False),
        "off_lr_1e-2": config(1e-2, False), "other": config(1e-3, None),
    }  # fmt: skip
    configs["on_lr_1e-2"] |= {"seed_everything": 7, "data": {"seed": 7}}  # an arm need not have the seeds of the others
    configs["on_lr_1e-3"] |= {"seed_everything": 8, "data": {"seed": 8}}
    before = copy.deepcopy(configs)
    found = find_ladders(configs)
    assert [dict(one.rungs) for one in found] == [
        {1e-3: "on_lr_1e-3", 1e-2: "on_lr_1e-2"},
        {1e-3: "off_lr_1e-3", 1e-2: "off_lr_1e-2"},
    ]
    assert [one.name for one in found] == ["on_lr", "off_lr"]
    assert configs == before
    assert Ladder({1e-3: "baseline", 1e-2: "hot"}).name == "baseline"
