"""Random choices of a sample do not depend on the samples beside it."""

from hashlib import blake2b

import torch

from lightning_moevlm.model.initial_weights import derive_seed
from lightning_moevlm.model.objectives import Draws

KEYS = [f"sample{index}" for index in range(500)]


def test_numbers_of_a_sample_do_not_depend_on_its_place_or_on_how_many_are_drawn() -> None:
    whole = Draws(3).uniform("text", KEYS, 20)
    assert torch.equal(Draws(3).uniform("text", KEYS[7:9][::-1], 11), whole[7:9, :11].flip(0))
    assert Draws(3).uniform("text", [], 4).shape == (0, 4)


def test_numbers_change_with_seed_name_and_sample_and_are_uniform() -> None:
    one, seed, name = (Draws(seed).uniform(name, KEYS, 200) for seed, name in ((0, "text"), (1, "text"), (0, "image")))
    assert one.dtype == torch.float32 and float(one.min()) >= 0 and float(one.max()) < 1
    for numbers in (one, seed, name):
        # 100,000 of them: the mean of each tenth of [0, 1) is hit by 10,000 with a deviation of 95
        assert float((numbers.flatten().histc(10, 0, 1) - 10_000).abs().max()) < 500
    related = torch.stack(
        [one.flatten(), seed.flatten(), name.flatten(), one.roll(1, 0).flatten(), one.roll(1, 1).flatten()]
    )
    assert float((related.corrcoef() - torch.eye(5)).abs().max()) < 0.02  # 6 deviations of 0.003


def splitmix(value: int) -> int:
    """Finaliser of SplitMix64, in whole numbers."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ (value >> shift)) * factor % 2**64
    return value ^ (value >> 31)


def test_numbers_are_those_of_the_published_generator() -> None:
    golden = 0x9E3779B97F4A7C15
    assert splitmix(golden) == 0xE220A8397B1DCDAF  # its first number from state 0
    key = int.from_bytes(blake2b(b"cat/0001", digest_size=8).digest(), "big")
    state = splitmix(key ^ derive_seed(5, "image"))
    expected = [(splitmix((state + n * golden) % 2**64) >> 40) / 2**24 for n in (1, 2, 3)]
    assert Draws(5).uniform("image", ["cat/0001"], 3).tolist() == [expected]
