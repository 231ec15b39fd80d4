"""Initial weights belong to a name: arms share them wherever name and shape agree."""

import torch

from lightning_moevlm.layers import initialise
from lightning_moevlm.layers.initialise import seed_of
from tests.small_model import small_vl_moe


def test_arms_share_every_weight_of_equal_name_and_shape() -> None:
    moe = dict(small_vl_moe().named_parameters())
    dense = dict(small_vl_moe(sparse_modalities=()).named_parameters())
    shared = {name for name in moe.keys() & dense.keys() if moe[name].shape == dense[name].shape}
    assert all(torch.equal(moe[name], dense[name]) for name in shared)
    assert set(moe) - shared == {name for name in moe if "router" in name or "experts" in name}


def test_seeds_differ_and_repeat() -> None:
    one, again, two = (dict(small_vl_moe(seed=seed).named_parameters()) for seed in (1, 1, 2))
    name = "blocks.0.attention.out.weight"
    assert torch.equal(one[name], again[name]) and not torch.equal(one[name], two[name])


def test_experts_do_not_start_equal() -> None:
    # LibMoE seeds every expert alike, so nothing breaks their symmetry
    stack = dict(small_vl_moe().named_parameters())["blocks.1.ffn.image.experts.up_EDF"]
    assert not torch.equal(stack[0], stack[1])


def test_scales() -> None:
    linear, norm = torch.nn.Linear(64, 64), torch.nn.LayerNorm(64)
    for module in (linear, norm):
        torch.nn.init.constant_(module.weight, 7)
        initialise(module, seed=0, std=0.02)
    assert torch.equal(norm.weight, torch.ones(64)) and torch.equal(linear.bias, torch.zeros(64))
    assert 0.015 < float(linear.weight.detach().std()) < 0.02 and float(linear.weight.detach().abs().max()) <= 0.04


def test_seed_is_the_same_on_every_machine() -> None:
    # sha256("0/train/7"), first 8 bytes, big-endian, halved
    assert seed_of(0, "train", 7) == int.from_bytes(bytes.fromhex(SHA256_0_TRAIN_7), "big") >> 1


SHA256_0_TRAIN_7 = "78ef58397814c012"
