"""What every loss keeps: right and finite gradients, padding without influence, a scale that depth cannot move."""

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_moevlm.model.losses import OWN_LOSSES, AuxiliaryLosses, LossInput
from tests.model.losses.every_loss import LOSSES, first_matrices, loss_input, raw_loss
from tests.routing import full_plan


def random_logits(num_tokens: int, num_experts: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(num_tokens, num_experts, dtype=dtype, generator=torch.Generator().manual_seed(0))


def test_every_loss_of_the_set_is_here() -> None:
    assert {name.split(",")[0].split()[0] for name in LOSSES} == set(OWN_LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_value_is_a_scalar_in_the_dtype_of_the_logits(name: str) -> None:
    value = raw_loss(name, random_logits(8, 4))
    assert value.shape == () and value.dtype == torch.float32


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_is_read_from_the_device(name: str) -> None:
    # tensors on "meta" have shapes and no values: .item(), boolean indices or shapes that follow from data would fail
    inputs = tree_map(
        lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, loss_input(name, random_logits(8, 4))
    )
    value = LOSSES[name](inputs)
    assert value.is_meta and value.shape == ()


@pytest.mark.parametrize("name", LOSSES)
def test_padding_is_not_in_the_loss(name: str) -> None:
    logits_TE = random_logits(8, 4)
    padded_TE = torch.stack([logits_TE.view(2, 4, 4), torch.full((2, 4, 4), 50.0)], dim=2).flatten(0, 2)
    # every second position is padding, so sequences stay; modalities would not: all tokens here are of even position
    real_TE = torch.stack([logits_TE.view(2, 4, 4), -torch.ones(2, 4, 4)], dim=2).flatten(0, 2)
    valid_T = torch.arange(16) % 2 == 0
    torch.testing.assert_close(raw_loss(name, padded_TE, valid_T=valid_T), raw_loss(name, real_TE, valid_T=valid_T))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("num_tokens", [0, 4])
def test_no_valid_token_gives_zero_and_a_finite_gradient(name: str, num_tokens: int) -> None:
    logits_TE = random_logits(num_tokens, 4).requires_grad_()
    value = raw_loss(name, logits_TE, valid_T=torch.zeros(num_tokens, dtype=torch.bool))
    value.backward()
    assert float(value.detach()) == 0.0
    assert logits_TE.grad is not None and float(logits_TE.grad.abs().sum()) == 0.0


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_in_float64(name: str) -> None:
    logits_TE = random_logits(6, 3, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda values_TE: raw_loss(name, values_TE), (logits_TE,))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "logits_TE",
    [
        pytest.param(torch.zeros(8, 4), id="zero router"),
        pytest.param(torch.eye(4).repeat(2, 1) * 30, id="perfect balance"),
        pytest.param(random_logits(8, 4) - torch.tensor([0.0, 0.0, 0.0, 200.0]), id="empty expert"),
        pytest.param(torch.tensor([[200.0, 0.0, 0.0, 0.0]]).repeat(8, 1), id="one expert for all"),
        pytest.param(random_logits(1, 4), id="one token"),
        pytest.param(random_logits(8, 1), id="one expert"),
    ],
)
def test_value_and_gradient_are_finite_at_the_edges(name: str, logits_TE: Tensor) -> None:
    logits_TE = logits_TE.clone().requires_grad_()
    value = raw_loss(name, logits_TE, noise=0.0)
    value.backward()
    assert bool(value.isfinite()) and bool(logits_TE.grad.isfinite().all())


@pytest.mark.parametrize("name", LOSSES)
def test_scale_does_not_move_with_the_number_of_layers(name: str) -> None:
    losses = AuxiliaryLosses(**{"load_balance": None, "router_z": None, name.split(",")[0].split()[0]: LOSSES[name]})
    rows = random_logits(4, 6)
    draws = getattr(LOSSES[name], "draws", False)
    layer = LossInput(full_plan(random_logits(8, 4)), rows, training=not draws, first_EDF=first_matrices(rows))
    partitions = {"text": random_logits(5, 1)[:, 0]}
    (one,) = losses.terms([layer], partitions).values()
    (three,) = losses.terms([layer] * 3, partitions | {"image": partitions["text"]}).values()
    torch.testing.assert_close(one.raw, three.raw)
    assert one.weight == three.weight


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_twice_is_the_batch_once(name: str) -> None:
    # twice as many tokens with the same statistics: neither the loss nor the total pull on the router may grow
    once_TE = random_logits(8, 4).requires_grad_()
    twice_TE = once_TE.detach().repeat(2, 1).requires_grad_()
    once, twice = (raw_loss(name, values_TE, noise=0.0) for values_TE in (once_TE, twice_TE))
    torch.testing.assert_close(once, twice)
    once.backward()
    twice.backward()
    torch.testing.assert_close(once_TE.grad, twice_TE.grad.view(2, 8, 4).sum(dim=0))
