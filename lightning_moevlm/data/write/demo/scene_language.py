"""Writes about scenes: captions, questions with answers, and statements that are true or false.

Every sentence is computed from the scene graph, so its truth is known by construction.
"""

from random import Random
from typing import Literal, NamedTuple

from lightning_moevlm.data.write.demo.drawing_catalogue import Drawing
from lightning_moevlm.data.write.demo.scene_graph import (
    GROUNDS,
    INVERSE,
    RELATIONS,
    Group,
    Relation,
    Scene,
    holds,
    salient_relation,
)

NUMBERS = ("no", "one", "two", "three", "four")
QuestionKind = Literal["existence", "count", "colour", "category", "relation"]


class Question(NamedTuple):
    """A question of one kind with its only right answer."""

    kind: QuestionKind
    question: str
    answer: str


class Statement(NamedTuple):
    """A sentence about the scene, with its truth."""

    text: str
    truth: bool


def phrase(group: Group) -> str:
    """Return "a star", "an umbrella" or "two stars"."""
    return count_phrase(group.drawing, group.num_copies)


def caption(scene: Scene) -> str:
    """Describe the first group's relation to each other one, and the ground's colour."""
    first, others = scene.groups[0], scene.groups[1:]
    placed: dict[Relation | None, list[str]] = {}
    for other in others:
        placed.setdefault(salient_relation(first, other), []).append(phrase(other))
    parts = [f"{relation or 'with'} {_join_phrases(phrases)}" for relation, phrases in placed.items()]
    ground = f"on {_article(scene.ground)} {scene.ground} ground"
    if len(parts) < 2:
        return " ".join([phrase(first), *parts, ground])
    return f"{phrase(first)} {', '.join(parts)}, {ground}"


def questions(scene: Scene, world: tuple[Drawing, ...], random: Random) -> tuple[Question, ...]:
    """Ask for existence (yes and no), count, colour and category, and for relations if there are any."""
    groups = scene.groups
    absent = random.choice([p for p in world if p not in {group.drawing for group in groups}])
    group = random.choice(groups)
    counted = random.choice(groups)
    asked = [
        Question("existence", f"is there {count_phrase(group.drawing, 1)}?", "yes"),
        Question("existence", f"is there {count_phrase(absent, 1)}?", "no"),
        Question("count", f"how many {counted.drawing.plural} are there?", NUMBERS[counted.num_copies]),
        Question("colour", "what colour is the ground?", scene.ground),
    ]
    coloured = [g for g in groups if g.drawing.colour is not None and g.drawing.colour not in g.drawing.name]
    if coloured:
        one = random.choice(coloured)
        assert one.drawing.colour is not None
        asked.append(Question("colour", f"what colour {_is(one)} {_the(one)}?", one.drawing.colour))
    kind = random.choice(groups)
    asked.append(Question("category", f"what kind of thing {_is(kind)} {_the(kind)}?", kind.drawing.category))
    pairs = _find_related(scene)
    if pairs:
        one, relation, other = random.choice(pairs)
        true = random.random() < 0.5
        said = relation if true else INVERSE[relation]
        asked.append(Question("relation", f"{_is(one)} {_the(one)} {said} {_the(other)}?", "yes" if true else "no"))
        unique = [(r, o) for r in RELATIONS for o in groups if len(_find_standing(scene, r, o)) == 1]
        if unique:
            said, other = random.choice(unique)
            (standing,) = _find_standing(scene, said, other)
            asked.append(Question("relation", f"what is {said} {_the(other)}?", standing.drawing.name))
    return tuple(asked)


def statements(scene: Scene, world: tuple[Drawing, ...], random: Random) -> tuple[Statement, ...]:
    """Make equally many true and false statements, for pairs of images as in NLVR2."""
    groups = scene.groups
    absent = random.choice([p for p in world if p not in {group.drawing for group in groups}])
    group = random.choice(groups)
    miscounted = random.choice([n for n in (1, 2, 3) if n != group.num_copies])
    other_ground = random.choice([ground for ground in GROUNDS if ground != scene.ground])
    made = [
        Statement(_exactly(group.drawing, group.num_copies), True),
        Statement(_exactly(group.drawing, miscounted), False),
        Statement(f"there is no {absent.name}", True),
        Statement(f"there is {count_phrase(absent, 1)}", False),
        Statement(f"the ground is {scene.ground}", True),
        Statement(f"the ground is {other_ground}", False),
    ]
    pairs = _find_related(scene)
    if pairs:
        one, relation, other = random.choice(pairs)
        made.append(Statement(f"{_the(one)} {_is(one)} {relation} {_the(other)}", True))
        made.append(Statement(f"{_the(one)} {_is(one)} {INVERSE[relation]} {_the(other)}", False))
    return tuple(made)


def _join_phrases(phrases: list[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return " and ".join([*([", ".join(phrases[:-1])] if phrases[:-1] else []), phrases[-1]])


def _find_related(scene: Scene) -> list[tuple[Group, Relation, Group]]:
    pairs = []
    for one in scene.groups:
        for other in scene.groups:
            relation = None if one is other else salient_relation(one, other)
            if relation is not None:
                pairs.append((one, relation, other))
    return pairs


def _find_standing(scene: Scene, relation: Relation, other: Group) -> list[Group]:
    return [group for group in scene.groups if group is not other and holds(group, relation, other)]


def _exactly(drawing: Drawing, count: int) -> str:
    return f"there {'is' if count == 1 else 'are'} exactly {NUMBERS[count]} {_noun(drawing, count)}"


def count_phrase(drawing: Drawing, count: int) -> str:
    """Return "a star", "an umbrella" or "two stars"."""
    if count == 1:
        return f"{_article(drawing.name)} {drawing.name}"
    return f"{NUMBERS[count]} {drawing.plural}"


def _noun(drawing: Drawing, count: int) -> str:
    return drawing.name if count == 1 else drawing.plural


def _the(group: Group) -> str:
    return f"the {_noun(group.drawing, group.num_copies)}"


def _is(group: Group) -> str:
    return "is" if group.num_copies == 1 else "are"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" and not word.startswith("uni") else "a"
