"""ZClip by hand."""

import math

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.training.optim import ZClip
from lightning_moevlm.training.optim.gradients.z_clip import NormStatistics

CPU = torch.device("cpu")


def run(clip: ZClip, norms: list[float]) -> tuple[list[float], NormStatistics]:
    statistics = NormStatistics.empty(CPU)
    coefficients = []
    for norm in norms:
        coefficient, statistics = clip(torch.tensor(norm), statistics)
        coefficients.append(float(coefficient))
    return coefficients, statistics


def test_an_outlier_is_clipped_by_hand() -> None:
    # of 1, 2, 3: mean 2, variance 2/3. z of 10 = 8 / 0.8165 = 9.798: clip to 2 + 2.5^2 / 9.798 x 0.8165 = 2.52083
    # then mean = 0.97 x 2 + 0.03 x 2.52083, variance = 0.97 x 2/3 + 0.03 (2.52083 - mean)^2
    coefficients, statistics = run(ZClip(warmup_steps=3), [1.0, 2.0, 3.0, 10.0])
    assert coefficients == pytest.approx([1.0, 1.0, 1.0, 0.252083], rel=1e-5)
    mean = 0.97 * 2 + 0.03 * 2.520833
    assert float(statistics.mean) == pytest.approx(mean)
    assert float(statistics.variance) == pytest.approx(0.97 * 2 / 3 + 0.03 * (2.520833 - mean) ** 2)


def test_ordinary_norms_pass_and_are_averaged() -> None:
    # 3.9 is 2.33 standard deviations up: below 2.5
    coefficients, statistics = run(ZClip(warmup_steps=3), [1.0, 2.0, 3.0, 3.9])
    assert coefficients == [1.0] * 4
    assert float(statistics.mean) == pytest.approx(0.97 * 2 + 0.03 * 3.9)


def test_the_further_out_the_closer_to_the_mean() -> None:
    clipped = [norm * run(ZClip(warmup_steps=3), [1.0, 2.0, 3.0, norm])[0][3] for norm in (5.0, 10.0, 1000.0)]
    assert clipped[0] > clipped[1] > clipped[2] > 2.0


def test_nothing_is_clipped_while_warming_up() -> None:
    assert run(ZClip(warmup_steps=5), [1.0, 1.1, 1.0, 100.0])[0] == [1.0] * 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_left_out(bad: float) -> None:
    for norms in ([1.0, bad, 2.0, 3.0], [1.0, 2.0, 3.0, bad]):
        coefficients, statistics = run(ZClip(warmup_steps=3), norms)
        assert coefficients == [1.0] * 4
        assert float(statistics.mean) == pytest.approx(2.0)
        assert float(statistics.variance) == pytest.approx(2 / 3)
        assert int(statistics.num_steps) == 3


@pytest.mark.parametrize(("option", "value"), [("z", 0.0), ("alpha", 1.0), ("warmup_steps", 1)])
def test_impossible_options_are_refused(option: str, value: float) -> None:
    with pytest.raises(UserError, match=f"z_clip.{option} is {value}"):
        ZClip(**{option: value})
