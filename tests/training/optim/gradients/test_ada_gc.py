"""AdaGC by hand; experts without tokens do not change its averages."""

import math

import pytest
import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.training.optim import AdaGC
from lightning_moevlm.training.optim.gradients.ada_gc import NormAverages

CPU = torch.device("cpu")


def run(clip: AdaGC, *norms: list[float]) -> tuple[list[Tensor], NormAverages]:
    averages = NormAverages.empty(len(norms[0]), CPU)
    coefficients = []
    for norm_G in norms:
        coefficient_G, averages = clip(torch.tensor(norm_G), averages)
        coefficients.append(coefficient_G)
    return coefficients, averages


def test_one_step_of_each_phase_by_hand() -> None:
    # warming up: norm of all 5, clipped to 1: averages 0.6 and 0.8
    # after it: 0.63 is 1.05 x 0.6 and passes; 8 is cut to 1.05 x 0.8 = 0.84
    #           averages 0.98 x 0.6 + 0.02 x 0.62 and 0.98 x 0.8 + 0.02 x 0.84
    (first, second), averages = run(AdaGC(warmup_steps=1), [3.0, 4.0], [0.62, 8.0])
    torch.testing.assert_close(first, torch.tensor([0.2, 0.2]))
    torch.testing.assert_close(second, torch.tensor([1.0, 0.105]))
    torch.testing.assert_close(averages.average_G, torch.tensor([0.6004, 0.8008]))


def test_the_smallest_norm_of_the_warmup_is_the_start() -> None:
    _, averages = run(AdaGC(warmup_steps=3, warmup_norm=100.0), [5.0, 2.0], [3.0, 4.0], [4.0, 6.0])
    assert averages.average_G.tolist() == [3.0, 2.0]


def test_an_expert_without_tokens_is_not_silenced_for_good() -> None:
    # a zero in the average would make the limit zero, and the gradient, and the average, for ever
    _, averages = run(AdaGC(warmup_steps=1), [0.0, 0.5], [0.0, 0.5])
    assert averages.average_G.tolist() == pytest.approx([math.inf, 0.5])
    coefficient_G, averages = AdaGC(warmup_steps=1)(torch.tensor([0.3, 0.5]), averages)
    assert coefficient_G.tolist() == [1.0, 1.0]
    assert averages.average_G.tolist() == pytest.approx([0.3, 0.5])
    coefficient_G, averages = AdaGC(warmup_steps=1)(torch.tensor([0.0, 0.5]), averages)
    assert averages.average_G.tolist() == pytest.approx([0.3, 0.5])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_left_out(bad: float) -> None:
    coefficients, averages = run(AdaGC(warmup_steps=1), [bad, 4.0], [0.3, 0.4], [0.3, bad])
    assert averages.average_G.tolist() == pytest.approx([0.3, 0.4])
    assert coefficients[0].tolist() == coefficients[2].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("option", "value"), [("relative", 0.0), ("beta", 1.0), ("warmup_steps", 0)])
def test_impossible_options_are_refused(option: str, value: float) -> None:
    with pytest.raises(UserError, match=f"ada_gc.{option} is {value}"):
        AdaGC(**{option: value})
