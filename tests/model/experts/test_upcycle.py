"""Experts made of a dense feed-forward: copies, noise, new units and slices."""

import pytest
import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.experts.upcycle import Upcycle, make_biases, make_experts

DIM, HIDDEN, EXPERTS = 6, 8, 4
UP = torch.randn(DIM, HIDDEN, generator=torch.Generator().manual_seed(0))
DOWN = torch.randn(HIDDEN, DIM, generator=torch.Generator().manual_seed(1))
BIAS_F, BIAS_D = UP[0] + 1, DOWN[0] - 1
TOKENS = torch.randn(5, DIM, generator=torch.Generator().manual_seed(2))


def made(options: Upcycle, num_slices: int = 1) -> tuple[Tensor, Tensor]:
    up = make_experts(UP, EXPERTS, 1, options, "blocks.0.ffn", "experts.up_EDF", num_slices)
    return up, make_experts(DOWN, EXPERTS, 0, options, "blocks.0.ffn", "experts.down_EFD", num_slices)


def test_experts_are_copies() -> None:
    up, down = made(Upcycle())
    for expert in range(EXPERTS):
        assert torch.equal(up[expert], UP)
        assert torch.equal(down[expert], DOWN)


def test_slices_of_a_copy_add_up_to_it() -> None:
    """Experts 0 and 1 are the halves of the first copy, experts 2 and 3 those of the second."""
    up, down = made(Upcycle(), 2)
    assert up.shape == (EXPERTS, DIM, HIDDEN // 2)
    assert down.shape == (EXPERTS, HIDDEN // 2, DIM)
    hidden_bias = make_biases(BIAS_F, EXPERTS, True, 2)
    last_bias = make_biases(BIAS_D, EXPERTS, False, 2)
    expected = torch.tanh(TOKENS @ UP + BIAS_F) @ DOWN + BIAS_D
    parts = [torch.tanh(TOKENS @ up[e] + hidden_bias[e]) @ down[e] + last_bias[e] for e in range(EXPERTS)]
    torch.testing.assert_close(parts[0] + parts[1], expected)
    torch.testing.assert_close(parts[2] + parts[3], expected)
    assert not torch.allclose(parts[0], parts[1])


def test_noise_is_as_wide_as_said_and_differs_between_experts() -> None:
    up, _ = made(Upcycle(noise=0.1))
    added = up - UP
    assert float(added.std() / UP.std()) == pytest.approx(0.1, rel=0.15)
    assert not torch.equal(added[0], added[1])
    assert torch.equal(up, made(Upcycle(noise=0.1))[0])
    assert not torch.equal(up, made(Upcycle(noise=0.1, seed=1))[0])


@pytest.mark.parametrize("num_slices", [1, 2])
def test_new_units_are_the_same_in_every_stack_of_a_layer(num_slices: int) -> None:
    options = Upcycle(reinitialised=0.5)
    (up, down), (old_up, old_down) = made(options, num_slices), made(Upcycle(), num_slices)
    for expert in range(EXPERTS):
        new = (up[expert] != old_up[expert]).all(dim=0)
        assert int(new.sum()) == HIDDEN // num_slices // 2
        assert torch.equal(new, (down[expert] != old_down[expert]).all(dim=1))
        assert torch.equal(up[expert][:, ~new], old_up[expert][:, ~new])


def test_impossible_numbers_are_refused() -> None:
    for options in ({"noise": -0.1}, {"reinitialised": 1.5}):
        with pytest.raises(UserError, match=r"upcycle\."):
            Upcycle(**options)  # type: ignore[arg-type]
