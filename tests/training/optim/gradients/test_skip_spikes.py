"""Which steps are spikes, by hand."""

import math

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.training.optim import SkipSpikes
from lightning_moevlm.training.optim.gradients.skip_spikes import SpikeWindow

CPU = torch.device("cpu")


def run(rule: SkipSpikes, losses: list[float], norms: list[float]) -> tuple[list[bool], SpikeWindow]:
    window = SpikeWindow.empty(rule.window, CPU)
    skips = []
    for loss, norm in zip(losses, norms, strict=True):
        skip, window = rule(torch.tensor(loss), torch.tensor(norm), window)
        skips.append(bool(skip))
    return skips, window


def test_an_outlier_of_the_window_by_hand() -> None:
    # losses 3, 1, 2, 2: mean 2, variance 2/3, std 0.8165; the limit at 2 sigma is 3.633
    rule = SkipSpikes(sigma=2.0, window=4)
    calm = [3.0, 1.0, 2.0, 2.0]
    for loss, spike in ((3.6, False), (3.7, True)):
        assert run(rule, [*calm, loss], [1.2, 1.0, 1.1, 1.1, 1.1])[0] == [False] * 4 + [spike]
        assert run(rule, [1.2, 1.0, 1.1, 1.1, 1.1], [*calm, loss])[0] == [False] * 4 + [spike]


def test_nothing_is_a_spike_before_half_the_window_is_seen() -> None:
    losses = [1.0, 1.1, 100.0, 1.0]
    assert run(SkipSpikes(window=8), losses, [1.0] * 4)[0] == [False] * 4
    # four of eight are half: the fifth is measured against them
    assert run(SkipSpikes(window=8), [1.0, 1.1, 1.0, 1.1, 100.0], [1.0] * 5)[0] == [False] * 4 + [True]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_skipped_at_once_and_left_out(bad: float) -> None:
    skips, window = run(SkipSpikes(window=4), [bad, 1.0, 2.0], [1.0, bad, 2.0])
    assert skips == [True, True, False]
    assert window.loss_J[-2:].tolist() == [1.0, 2.0] and window.norm_J[-2:].tolist() == [1.0, 2.0]
    assert int(window.num_skipped) == 2


def test_a_new_level_is_accepted_in_time() -> None:
    # outliers enter the window: were they kept out, training would be skipped from here on
    losses = [1.0, 1.1, 1.0, 1.1] + [9.0, 9.1] * 4
    skips, _ = run(SkipSpikes(sigma=3.0, window=4), losses, [1.0] * len(losses))
    assert skips[4] and not any(skips[6:])


def test_a_window_keeps_its_newest_when_it_is_resized() -> None:
    window = run(SkipSpikes(window=4), [1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0])[1]
    assert window.resize(2).loss_J.tolist() == [3.0, 4.0]
    longer = window.resize(6)
    assert longer.loss_J.isnan().tolist() == [True, True, False, False, False, False]
    assert longer.norm_J[2:].tolist() == [5.0, 6.0, 7.0, 8.0]


@pytest.mark.parametrize(("option", "value"), [("sigma", 0.0), ("window", 3)])
def test_impossible_options_are_refused(option: str, value: float) -> None:
    with pytest.raises(UserError, match=f"skip_spikes.{option} is {value}"):
        SkipSpikes(**{option: value})
