"""Writes statements about two scenes that are true or false, as in NLVR2 (arXiv 1811.00491).

Every text comes twice, once with two scenes of which it is true and once with two of which it is false. So a model that
reads the text alone is right half of the time, on every set of whole twins. Truth follows from the scene graphs.

    both     both images contain a star
    one      exactly one of the images contains a star
    other    one image contains a star and the other one contains a fir tree
    more     the left image contains more stars than the right one
    total    the two images contain three stars in total
    ground   the grounds of both images have the same colour
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Literal, NamedTuple, get_args

from lightning_moevlm.data.write.demo.drawing_catalogue import Drawing
from lightning_moevlm.data.write.demo.scene_language import NUMBERS, count_phrase

StatementKind = Literal["both", "one", "other", "more", "total", "ground"]
KINDS: tuple[StatementKind, ...] = get_args(StatementKind)
_LARGEST_TOTAL = len(NUMBERS) - 1
_TEXTS = 50  # tried before a split is called too small
_PAIRS = 200  # of scenes, tried for each text and truth


class Content(NamedTuple):
    """What statements say of a scene."""

    ground: str
    counts: Mapping[Drawing, int]


class PairStatement(NamedTuple):
    """A statement about two scenes, given by their places in a sequence."""

    kind: StatementKind
    text: str
    truth: bool
    left: int
    right: int


class _Claim(NamedTuple):
    """A text and when it is true."""

    text: str
    named: tuple[Drawing, ...]  # drawings that the text names
    num_showing: int  # images that show one of them, at least: otherwise one image would often be enough
    holds: Callable[[Content, Content], bool]


def pair_statements(scenes: Sequence[Content], num_statements: int, seed: str) -> Iterator[PairStatement]:
    """Yield statements in twins, one true and one false; an odd number gets one more.

    Raises:
        ValueError: too few scenes for a kind of statement, which the message names.
    """
    showing: dict[Drawing, list[int]] = {}
    for place, scene in enumerate(scenes):
        for drawing in scene.counts:
            showing.setdefault(drawing, []).append(place)
    drawings = sorted(showing)
    for number in range(-(-num_statements // 2)):
        random = Random(f"statement/{seed}/{number}")
        kind = KINDS[number % len(KINDS)]
        for _ in range(_TEXTS if len(drawings) > 1 else 0):
            claim = _make_claim(kind, drawings, random)
            found = [_find_pair(claim, truth, scenes, showing, random) for truth in (True, False)]
            if None not in found:
                break
        else:
            raise ValueError(f"{len(scenes)} scenes are too few for statements of kind {kind!r}")
        for truth, pair in zip((True, False), found, strict=True):
            assert pair is not None
            yield PairStatement(kind, claim.text, truth, *pair)


def _make_claim(kind: StatementKind, drawings: Sequence[Drawing], random: Random) -> _Claim:
    one, other = random.sample(drawings, 2)
    named, a = (one,), count_phrase(one, 1)
    if kind == "both":
        text = f"both images contain {a}"
        return _Claim(text, named, 1, lambda left, right: one in left.counts and one in right.counts)
    if kind == "one":
        text = f"exactly one of the images contains {a}"
        return _Claim(text, named, 0, lambda left, right: (one in left.counts) != (one in right.counts))
    if kind == "other":
        return _Claim(
            f"one image contains {a} and the other one contains {count_phrase(other, 1)}",
            (one, other),
            1,
            lambda left, right: (
                (one in left.counts and other in right.counts) or (other in left.counts and one in right.counts)
            ),
        )
    if kind == "more":
        text = f"the left image contains more {one.plural} than the right one"
        return _Claim(text, named, 1, lambda left, right: left.counts.get(one, 0) > right.counts.get(one, 0))
    if kind == "total":
        total = random.randint(2, _LARGEST_TOTAL)
        text = f"the two images contain {count_phrase(one, total)} in total"
        return _Claim(text, named, 1, lambda left, right: left.counts.get(one, 0) + right.counts.get(one, 0) == total)
    text = "the grounds of both images have the same colour"
    return _Claim(text, (), 0, lambda left, right: left.ground == right.ground)


def _find_pair(
    claim: _Claim, truth: bool, scenes: Sequence[Content], showing: Mapping[Drawing, Sequence[int]], random: Random
) -> tuple[int, int] | None:
    """Return two scenes of which the claim is true, or false; None if none is found."""
    for _ in range(_PAIRS):
        drawn = [random.randrange(len(scenes)), random.randrange(len(scenes))]
        wanted = random.sample(claim.named, len(claim.named))
        for place in range(random.randrange(3) if wanted else 0):  # so many of the two show what the text names
            drawn[place] = random.choice(showing[wanted[place % len(wanted)]])
        if random.random() < 0.5:
            drawn.reverse()
        left, right = drawn
        num_showing = sum(not scenes[place].counts.keys().isdisjoint(claim.named) for place in drawn)
        if left == right or num_showing < claim.num_showing:
            continue
        if claim.holds(scenes[left], scenes[right]) == truth:
            return left, right
    return None
