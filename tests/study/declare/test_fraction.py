"""Fractions by hand: runs, defining words, aliases with signs; and the sizes that the tables of designs give."""

import itertools

import pytest

from lightning_moevlm.study.declare.designs.fraction import find_fraction, generate_fraction


def test_half_of_three_by_hand():
    fraction = generate_fraction(("a", "b", "c"), {"c": ("a", "b")})
    # c is on where one of a and b is: as columns of -1 and +1, c = -a*b, so I = -a*b*c
    assert fraction.runs() == (
        (False, False, False),
        (True, False, True),
        (False, True, True),
        (True, True, False),
    )
    assert fraction.words() == (("a", "b", "c"),)
    assert fraction.resolution == 3
    assert fraction.aliases() == ("a = -b*c", "b = -a*c", "c = -a*b")
    assert fraction.describe() == (
        "4 of 8 combinations, resolution III; defining relation I = -a*b*c",
        "aliased: a = -b*c",
        "aliased: b = -a*c",
        "aliased: c = -a*b",
    )


def test_half_of_four_by_hand():
    fraction = generate_fraction(("a", "b", "c", "d"), {"d": ("a", "b", "c")})
    # I = a*b*c*d: main effects are aliased with interactions of three alone, which are not told
    assert fraction.aliases() == ("a*b = c*d", "a*c = b*d", "a*d = b*c")


def test_quarter_of_five_by_hand():
    fraction = generate_fraction(("a", "b", "c", "d", "e"), {"d": ("a", "b"), "e": ("a", "c")})
    # words a*b*d and a*c*e, and their product b*c*d*e
    assert fraction.words() == (("a", "b", "d"), ("a", "c", "e"), ("b", "c", "d", "e"))
    assert fraction.describe()[0] == (
        "8 of 32 combinations, resolution III; defining relation I = -a*b*d = -a*c*e = b*c*d*e"
    )
    assert "a = -b*d = -c*e" in fraction.aliases()
    assert "b*c = d*e" in fraction.aliases()


def test_clear_of_each_other():
    fraction = find_fraction(tuple("abcde"), 5)
    assert fraction is not None
    assert fraction.aliases() == ()
    assert fraction.describe()[1] == "no main effect or interaction of two factors is aliased with another"


@pytest.mark.parametrize(
    ("factors", "resolution", "runs"),
    [  # Montgomery, Design and Analysis of Experiments, table 8.14: the smallest fractions of each resolution
        (3, 3, 4), (5, 3, 8), (7, 3, 8), (9, 3, 16), (4, 4, 8), (6, 4, 16), (8, 4, 16), (9, 4, 32), (5, 5, 16),
        (6, 5, 32), (7, 5, 64), (8, 5, 64), (10, 5, 128), (11, 5, 128),
    ],
)  # fmt: skip
def test_smallest_fractions(factors, resolution, runs):
    fraction = find_fraction(tuple("abcdefghijk"[:factors]), resolution)
    assert fraction is not None
    assert len(fraction.runs()) == runs
    # by brute force over the columns: no product of fewer than `resolution` columns is constant
    columns = [[1 if run[i] else -1 for run in fraction.runs()] for i in range(factors)]
    for size in range(1, resolution):
        for some in itertools.combinations(columns, size):
            products = set()
            for row in zip(*some, strict=True):
                product = 1
                for value in row:
                    product *= value
                products.add(product)
            assert products == {-1, 1}


def test_signs_of_aliases_hold_in_the_columns():
    fraction = find_fraction(tuple("abcdef"), 3)
    assert fraction is not None
    columns = {name: [1 if run[i] else -1 for run in fraction.runs()] for i, name in enumerate(fraction.factors)}

    def column(effect: str) -> list[int]:
        sign, names = (-1, effect[1:]) if effect.startswith("-") else (1, effect)
        product = [sign] * len(fraction.runs())
        for name in names.split("*"):
            product = [a * b for a, b in zip(product, columns[name], strict=True)]
        return product

    chains = fraction.aliases()
    assert chains
    for chain in chains:
        first, *others = [column(effect) for effect in chain.split(" = ")]
        assert all(other == first for other in others)


def test_no_part_has_more_than_the_whole():
    assert find_fraction(("a", "b", "c"), 4) is None
