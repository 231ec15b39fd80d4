"""Optimisers by hand and against torch's; all treat stacks as separate experts and restore their state."""

import io
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.experts import MLPExperts
from lightning_moevlm.model.layers import MoEFFN, initialise
from lightning_moevlm.training.optim import Hyperball, Lion, MuonAdamW, StableAdamW, parameter_groups
from lightning_moevlm.training.optim.optimizers.hyperball import turn
from lightning_moevlm.training.optim.optimizers.muon import even_out_neurons, orthogonalise

OPTIMIZERS = [
    pytest.param(partial(AdamW, lr=0.1, weight_decay=0.1), id="AdamW"),
    pytest.param(partial(AdamW, lr=0.1, weight_decay=0.1, fused=True), id="AdamW-fused"),
    pytest.param(partial(StableAdamW, lr=0.1, weight_decay=0.1), id="StableAdamW"),
    pytest.param(partial(Lion, lr=0.1, weight_decay=0.1), id="Lion"),
    pytest.param(partial(MuonAdamW, lr=0.1, weight_decay=0.1), id="MuonAdamW"),
    pytest.param(partial(MuonAdamW, lr=0.1, weight_decay=0.1, num_polishing=2), id="hybrid Muon"),
    pytest.param(partial(Hyperball, lr=0.1, base="adam"), id="AdamH"),
    pytest.param(partial(Hyperball, lr=0.1, weight_decay=0.1), id="MuonH"),
]
NOR_MUON = pytest.param(partial(MuonAdamW, lr=0.1, neuron_beta=0.95), id="NorMuon")  # neurons of a stack are columns
Build = Callable[..., Optimizer]


def step(optimizer: Optimizer, params: list[nn.Parameter], gradients: list[Tensor]) -> None:
    for parameter, gradient in zip(params, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()


def test_stable_adamw_by_hand() -> None:
    # betas 1/2, gradients 2 and 6
    # 1: m = 1 -> 2, u = 2 -> 4 after correction by 1/2; rms = sqrt(4 / 4) = 1, the rate stays 0.1
    #    p = 1 (1 - 0.1 x 0.5) - 0.1 x 2 / 2 = 0.85
    # 2: m = 3.5 -> 14/3, u = 19 -> 76/3 after correction by 3/4; rms = sqrt(36 x 3 / 76) = 1.19208, rate 0.1 / rms
    p = nn.Parameter(torch.tensor([1.0]))
    optimizer = StableAdamW([p], lr=0.1, betas=(0.5, 0.5), eps=1e-12, weight_decay=0.5)
    step(optimizer, [p], [torch.tensor([2.0])])
    assert p.item() == pytest.approx(0.85)
    step(optimizer, [p], [torch.tensor([6.0])])
    rate = 0.1 / math.sqrt(36 * 3 / 76)
    assert p.item() == pytest.approx(0.85 * (1 - 0.5 * rate) - rate * (14 / 3) / math.sqrt(76 / 3))


def test_stable_adamw_that_never_clips_is_adamw() -> None:
    ours, theirs = (nn.Parameter(torch.randn(4, 3, generator=generator(1))) for _ in range(2))
    options = {"lr": 0.03, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    pair = [(StableAdamW([ours], threshold=1e9, **options), ours), (AdamW([theirs], **options), theirs)]
    for seed in range(30):
        gradient = torch.randn(4, 3, generator=generator(seed)) * 10 ** (seed % 3)
        for optimizer, parameter in pair:
            step(optimizer, [parameter], [gradient])
    torch.testing.assert_close(ours, theirs)


def test_lion_by_hand() -> None:
    # 1: c = 0.1 x 2 > 0: p = 1 (1 - 0.1 x 0.5) - 0.1 = 0.85, m = 0.01 x 2 = 0.02
    # 2: c = 0.9 x 0.02 - 0.1 x 0.1 = 0.008 > 0: the sign is the momentum's. p = 0.85 x 0.95 - 0.1
    #    m = 0.99 x 0.02 - 0.01 x 0.1 = 0.0188
    p = nn.Parameter(torch.tensor([1.0]))
    optimizer = Lion([p], lr=0.1, weight_decay=0.5)
    step(optimizer, [p], [torch.tensor([2.0])])
    assert p.item() == pytest.approx(0.85)
    step(optimizer, [p], [torch.tensor([-0.1])])
    assert p.item() == pytest.approx(0.85 * 0.95 - 0.1)
    assert optimizer.state[p]["exp_avg"].item() == pytest.approx(0.0188)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_muon_is_torchs_muon_on_matrices(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())  # theirs rounds to bf16, ours only on CUDA
    ours, theirs = (nn.Parameter(torch.randn(shape, generator=generator(1))) for _ in range(2))
    mine = MuonAdamW([{"params": [ours], "role": "matrix"}], lr=0.02, weight_decay=0.1)
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for seed in range(10):
        gradient = torch.randn(shape, generator=generator(seed))
        step(mine, [ours], [gradient])
        step(reference, [theirs], [gradient])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_muon_orthogonalises_shared_experts_too() -> None:
    moe = MoEFFN(6, 4, shared=partial(MLPExperts, hidden_dim=4), num_shared=2)
    initialise(moe, 0)
    stack = moe.shared.up_EDF  # type: ignore[union-attr]
    before, gradient = stack.detach().clone(), torch.randn(stack.shape, generator=generator(0))
    optimizer = MuonAdamW(parameter_groups({"ffn.shared.up_EDF": stack}.items()), lr=0.1, weight_decay=0.0)
    step(optimizer, [stack], [gradient])
    # the first momentum is 0.05 g, so the direction is that of g, expert by expert
    expected = before - 0.1 * 0.2 * math.sqrt(6) * orthogonalise(gradient)
    torch.testing.assert_close(stack.detach(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("role", ["vector", "edge", "router"])
def test_muon_leaves_the_rest_to_adamw(role: str) -> None:
    ours, theirs = (nn.Parameter(torch.randn(4, 3, generator=generator(1))) for _ in range(2))
    mine = MuonAdamW([{"params": [ours], "role": role}], lr=0.03, weight_decay=0.1)
    reference = AdamW([theirs], lr=0.03, betas=(0.9, 0.95), weight_decay=0.1)
    for seed in range(10):
        gradient = torch.randn(4, 3, generator=generator(seed))
        step(mine, [ours], [gradient])
        step(reference, [theirs], [gradient])
    torch.testing.assert_close(ours, theirs)


def test_orthogonalised_keeps_directions_and_levels_singular_values() -> None:
    matrices = torch.randn(3, 8, 5, generator=generator(0)) * torch.tensor([1e-3, 1.0, 1e3]).view(3, 1, 1)
    result = orthogonalise(matrices)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    levelled = torch.linalg.svdvals(result)
    assert float(levelled.min()) > 0.6 and float(levelled.max()) < 1.3
    inner = u.mT @ result @ v.mT  # diagonal in the singular vectors of the input
    torch.testing.assert_close(inner, torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1)), rtol=0, atol=1e-4)
    assert float(orthogonalise(torch.zeros(2, 4, 3)).abs().max()) == 0.0  # an expert without tokens


def test_polished_singular_values_are_one() -> None:
    # x (2 - 1.5 x^2 + 0.5 x^4) keeps 1, with slope 0 there: 2 - 4.5 + 2.5
    matrices = torch.randn(3, 8, 5, generator=generator(0))
    plain, polished = (torch.linalg.svdvals(orthogonalise(matrices, 8, count)) for count in (0, 2))
    assert float((plain - 1).abs().max()) > 0.1
    assert float((polished - 1).abs().max()) < 0.01


def test_heads_are_orthogonalised_apart() -> None:
    # queries, keys and values of 2 heads of width 4: 6 matrices of (4, 8), one below the other
    names = {"blocks.0.attention.query_key_value.weight": 6}
    before, gradient = (torch.randn(24, 8, generator=generator(seed)) for seed in (0, 1))

    def stepped(per_head: bool | None) -> Tensor:
        p = nn.Parameter(before.clone())
        groups = parameter_groups([(next(iter(names)), p)], names)
        step(MuonAdamW(groups, lr=0.1, weight_decay=0.0, per_head=per_head), [p], [gradient])
        return p.detach()

    expected = before - 0.1 * 0.2 * math.sqrt(8) * orthogonalise(gradient.view(6, 4, 8)).reshape(24, 8)
    torch.testing.assert_close(stepped(True), expected, rtol=0, atol=1e-4)
    joined = before - 0.1 * 0.2 * math.sqrt(24) * orthogonalise(gradient)
    torch.testing.assert_close(stepped(None), joined, rtol=0, atol=1e-4)


def test_neurons_are_evened_out_by_hand() -> None:
    # rows (3, 4) and (0, 2) with means of squares 12.5 and 2; beta 1/2 from 0: 6.25 and 1, roots 2.5 and 1
    # rows become (1.2, 1.6) and (0, 2): size sqrt(1.44 + 2.56 + 4) = sqrt 8; scaled to 0.2 sqrt(4): x 0.4 / sqrt 8
    even, square = even_out_neurons(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.zeros(2, 1), -1, 0.5)
    assert square.tolist() == [[6.25], [1.0]]
    torch.testing.assert_close(even, torch.tensor([[1.2, 1.6], [0.0, 2.0]]) * 0.4 / math.sqrt(8))
    assert float(even.square().mean().sqrt()) == pytest.approx(0.2)


def test_a_neuron_of_a_stack_is_a_column() -> None:
    # (E, in, out) of experts is (out, in) of a linear layer, transposed
    stack, linear = (nn.Parameter(torch.randn(6, 4, generator=generator(0))) for _ in range(2))
    stack.data, linear.data = stack.data.unsqueeze(0), linear.data.t().contiguous()
    options = {"lr": 0.1, "neuron_beta": 0.9}
    one = MuonAdamW([{"params": [stack], "role": "expert"}], **options)  # type: ignore[arg-type]
    other = MuonAdamW([{"params": [linear], "role": "matrix"}], **options)  # type: ignore[arg-type]
    for seed in range(4):
        gradient = torch.randn(6, 4, generator=generator(seed))
        step(one, [stack], [gradient.unsqueeze(0)])
        step(other, [linear], [gradient.t()])
    torch.testing.assert_close(stack[0].detach(), linear.detach().t())


def test_turning_by_hand() -> None:
    # W = (3, 4) of size 5, u = (0, -7): W - 0.1 x 5 x (0, -1) = (3, 4.5), of size sqrt(29.25); back to size 5
    matrix, update = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, -7.0]])
    turned, radius = turn(matrix, update, torch.tensor(0.0), 0.1)
    assert float(radius) == 5.0
    torch.testing.assert_close(turned, torch.tensor([[3.0, 4.5]]) * 5 / math.sqrt(29.25))
    again, kept = turn(2 * turned, update, radius, 0.0)  # whatever moved it in between, its size comes back
    assert float(kept) == 5.0 and float(again.norm()) == pytest.approx(5.0)
    plain, none = turn(torch.zeros(1, 2), update, torch.tensor(0.0), 0.1)  # nothing to turn yet
    assert plain.tolist() == [[0.0, pytest.approx(0.7)]] and float(none) == 0.0


@pytest.mark.parametrize("base", ["adam", "muon"])
def test_matrices_stay_on_their_spheres_and_the_rest_is_adamw(base: str) -> None:
    shapes = {"matrix": (5, 4), "expert": (3, 6, 4), "vector": (5,), "router": (4, 3)}
    ours, theirs = (
        {role: nn.Parameter(torch.randn(shape, generator=generator(1))) for role, shape in shapes.items()}
        for _ in range(2)
    )
    sizes = [torch.linalg.matrix_norm(ours[role]).detach() for role in ("matrix", "expert")]
    held = Hyperball([{"params": [p], "role": role} for role, p in ours.items()], lr=0.05, base=base)  # type: ignore[arg-type]
    plain = AdamW(list(theirs.values()), lr=0.05, betas=(0.9, 0.95), weight_decay=0.0)
    for seed in range(8):
        before = ours["expert"].detach().clone()
        gradients = [torch.randn(shape, generator=generator(seed)) for shape in shapes.values()]
        step(held, list(ours.values()), gradients)
        step(plain, list(theirs.values()), gradients)
        moved = torch.linalg.matrix_norm(ours["expert"].detach() - before) / sizes[1]
        assert bool((moved < 0.051).all()) and bool((moved > 0.02).all())  # an angle, whatever the gradient's size
    for role, size in zip(("matrix", "expert"), sizes, strict=True):
        torch.testing.assert_close(torch.linalg.matrix_norm(ours[role]).detach(), size)
    assert all(torch.equal(ours[role], theirs[role]) for role in ("vector", "router"))
    assert held.state[ours["expert"]]["radius"].shape == (3,)


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_a_stack_is_its_experts_apart(build: Build) -> None:
    stack = nn.Parameter(torch.randn(3, 6, 4, generator=generator(0)))
    apart = [nn.Parameter(matrix.detach().clone()) for matrix in stack]
    one = build([{"params": [stack], "role": "expert"}])
    many = build([{"params": apart, "role": "matrix"}])
    for seed in range(6):
        gradient = torch.randn(3, 6, 4, generator=generator(seed))
        gradient[seed % 3] *= 50  # one expert's spike is its own
        step(one, [stack], [gradient])
        step(many, apart, list(gradient))
    torch.testing.assert_close(stack.detach(), torch.stack([matrix.detach() for matrix in apart]))


@pytest.mark.parametrize("build", [*OPTIMIZERS, NOR_MUON])
def test_state_comes_back_from_a_file(build: Build) -> None:
    def fresh() -> tuple[Optimizer, list[nn.Parameter]]:
        params = [nn.Parameter(torch.randn(*shape, generator=generator(7))) for shape in ((4, 3), (2, 4, 3), (5,))]
        groups = [{"params": [p], "role": role} for p, role in zip(params, ("matrix", "expert", "vector"), strict=True)]
        return build(groups), params

    def train(optimizer: Optimizer, params: list[nn.Parameter], seeds: range) -> None:
        for seed in seeds:
            step(optimizer, params, [torch.randn(p.shape, generator=generator(seed)) for p in params])

    whole, whole_params = fresh()
    train(whole, whole_params, range(6))
    first, first_params = fresh()
    train(first, first_params, range(3))
    file = io.BytesIO()
    torch.save({"optimizer": first.state_dict(), "params": [p.detach() for p in first_params]}, file)
    file.seek(0)
    kept = torch.load(file, weights_only=True)
    second, second_params = fresh()
    for parameter, value in zip(second_params, kept["params"], strict=True):
        parameter.data.copy_(value)
    second.load_state_dict(kept["optimizer"])
    train(second, second_params, range(3, 6))
    assert all(map(torch.equal, whole_params, second_params))


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_parameters_without_gradient_stay(build: Build) -> None:
    used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = build([used, unused])
    used.grad = torch.arange(4.0).view(2, 2)
    assert float(optimizer.step(lambda: torch.tensor(3.0))) == 3.0
    assert torch.equal(unused, torch.ones(2, 2)) and not torch.equal(used, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(Lion, betas=(0.9, 1.0)), r"betas of the optimiser are \(0\.9, 1\.0\)"),
        (partial(StableAdamW, threshold=0.0), r"threshold of StableAdamW is 0\.0: choose a value above 0"),
        (partial(MuonAdamW, momentum=1.5), r"momentum of MuonAdamW is 1\.5"),
        (partial(MuonAdamW, num_iterations=0), "num_iterations of MuonAdamW is 0"),
        (partial(MuonAdamW, num_polishing=0), "num_polishing of MuonAdamW is 0"),
        (partial(MuonAdamW, neuron_beta=1.0), r"neuron_beta of MuonAdamW is 1\.0"),
        (partial(Hyperball, matrix_lr_multiplier=0.0), r"matrix_lr_multiplier of Hyperball is 0\.0"),
    ],
)
def test_impossible_options_are_refused(build: Build, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build([nn.Parameter(torch.ones(1))])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
