"""Makes fractions of a two-level factorial: the combinations to run, and the effects that they cannot tell apart.

A factor is a vector over GF(2) in the q basic factors, and in run r (q bits) it is on where vector . r is odd. Basic
factors are unit vectors; each other one is generated, a sum of some of them. A subset of factors whose vectors sum to 0
is a word of the defining relation: the product of its columns is the same in all 2^q runs. The length of the shortest
word is the resolution (Box, Hunter & Hunter, Statistics for Experimenters, chapter 6). With III main effects are free
of each other, with IV also of interactions of two, with V these are free of each other too.

Run 0 has every factor off, so the baseline belongs to every fraction. With off = -1 and on = +1 a word of length L is
then the constant (-1)^L, which gives aliases their signs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

_WORDS_TOLD = 8
_ROMAN = {3: "III", 4: "IV", 5: "V", 6: "VI", 7: "VII", 8: "VIII"}


@dataclass(frozen=True)
class Fraction:
    """A regular two-level fraction."""

    factors: tuple[str, ...]
    vectors: tuple[int, ...]  # one per factor, bit i for the i-th basic factor
    num_basic: int  # q; there are 2^q runs

    def runs(self) -> tuple[tuple[bool, ...], ...]:
        """Return per run whether each factor is on; the first run has all off."""
        return tuple(
            tuple((vector & run).bit_count() % 2 == 1 for vector in self.vectors) for run in range(2**self.num_basic)
        )

    def words(self) -> tuple[tuple[str, ...], ...]:
        """Return the words of the defining relation, the shortest first."""
        size = len(self.factors)
        subsets = (subset for length in range(1, size + 1) for subset in combinations(range(size), length))
        return tuple(
            tuple(self.factors[i] for i in subset) for subset in subsets if _sum([self.vectors[i] for i in subset]) == 0
        )

    @property
    def resolution(self) -> int:
        """Length of the shortest word."""
        return len(self.words()[0])

    def aliases(self) -> tuple[str, ...]:
        """Return the chains of main effects and interactions of two that these runs cannot tell apart, with signs."""
        size = len(self.factors)
        chains: dict[int, list[tuple[int, ...]]] = {}
        for effect in [(i,) for i in range(size)] + list(combinations(range(size), 2)):
            chains.setdefault(_sum([self.vectors[i] for i in effect]), []).append(effect)
        return tuple(self._chain(effects) for effects in chains.values() if len(effects) > 1)

    def describe(self) -> tuple[str, ...]:
        """Return the alias structure in lines for people."""
        size, words = len(self.factors), self.words()
        relation = " = ".join(["I", *(_signed(len(word), "*".join(word)) for word in words[:_WORDS_TOLD])])
        more = f" and {len(words) - _WORDS_TOLD} longer or equal ones" if len(words) > _WORDS_TOLD else ""
        head = (
            f"{2**self.num_basic} of {2**size} combinations, resolution {_ROMAN.get(len(words[0]), len(words[0]))}; "
            f"defining relation {relation}{more}"
        )
        chains = self.aliases()
        if not chains:
            return (head, "no main effect or interaction of two factors is aliased with another")
        return (head, *(f"aliased: {chain}" for chain in chains))

    def _chain(self, effects: list[tuple[int, ...]]) -> str:
        # the product of two aliased effects is a word, whose length is odd where theirs differ by one
        first = len(effects[0])
        names = ["*".join(self.factors[i] for i in effect) for effect in effects]
        signed = [_signed(first + len(effect), name) for effect, name in zip(effects[1:], names[1:], strict=True)]
        return " = ".join([names[0], *signed])


def find_fraction(factors: tuple[str, ...], resolution: int) -> Fraction | None:
    """Return the smallest fraction found of at least that resolution, or None if it takes all combinations.

    For each number of basic factors, vectors are taken in ascending order as long as no sum of fewer than `resolution`
    of them is 0 (a lexicode). pyDOE3 1.6 takes generators without looking at their products: asked for resolution V of
    7 factors, it returns one of IV.
    """
    for num_basic in range(1, len(factors)):
        vectors = [1 << i for i in range(num_basic)]
        taken = set(vectors)
        for vector in range(1, 2**num_basic):
            if len(vectors) == len(factors):
                break
            if vector not in taken and vector not in _sums(vectors, resolution - 2):
                vectors.append(vector)
        if len(vectors) == len(factors):
            return Fraction(factors, tuple(vectors), num_basic)
    return None


def generate_fraction(factors: tuple[str, ...], generators: Mapping[str, tuple[str, ...]]) -> Fraction:
    """Return the fraction in which each generated factor is the sum of basic ones, e.g. {d: (a, b, c)}.

    Expects generators of known factors by basic ones alone, see read_design.
    """
    basic = [name for name in factors if name not in generators]
    vector_of = {name: 1 << i for i, name in enumerate(basic)}
    vectors = tuple(_sum([vector_of[part] for part in generators.get(name, (name,))]) for name in factors)
    return Fraction(factors, vectors, len(basic))


def _sums(vectors: list[int], most: int) -> set[int]:
    """Return the sums of up to `most` of the vectors, 0 included."""
    sums = {0}
    for count in range(1, most + 1):
        sums |= {_sum(list(some)) for some in combinations(vectors, count)}
    return sums


def _sum(vectors: list[int]) -> int:
    total = 0
    for vector in vectors:
        total ^= vector
    return total


def _signed(length: int, name: str) -> str:
    return f"-{name}" if length % 2 else name
