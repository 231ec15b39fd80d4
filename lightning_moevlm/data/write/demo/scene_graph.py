"""Describes scenes by graphs: groups with boxes, and all spatial relations between them.

A scene is a tinted ground with one to four groups; a group is one to three copies of one drawing. Boxes are tight
around the painted pixels. `A left of B` holds only if every box of A ends before any box of B begins. Groups that
overlap in both directions have no relation.
"""

from typing import Literal, NamedTuple, get_args

from lightning_moevlm.data.write.demo.drawing_catalogue import Drawing

Relation = Literal["left of", "right of", "above", "below"]
RELATIONS: tuple[Relation, ...] = get_args(Relation)
INVERSE: dict[Relation, Relation] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}

GROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "grey": (200, 200, 200),
    "pink": (255, 190, 205),
    "orange": (255, 205, 145),
    "yellow": (255, 242, 165),
    "green": (185, 230, 180),
    "blue": (170, 210, 255),
    "purple": (215, 185, 245),
}
"""RGB of each ground colour: pale, so that drawings stand out, and far enough apart to survive JPEG."""


class Box(NamedTuple):
    """Pixels left..right-1 and top..bottom-1."""

    left: int
    top: int
    right: int
    bottom: int


class Group(NamedTuple):
    """Copies of one drawing, one box each."""

    drawing: Drawing
    boxes: tuple[Box, ...]

    @property
    def num_copies(self) -> int:
        """Number of copies."""
        return len(self.boxes)


class Scene(NamedTuple):
    """The content of an image."""

    ground: str  # a key of GROUNDS
    groups: tuple[Group, ...]  # in the order of the caption, each of another drawing


class Fact(NamedTuple):
    """`groups[subject]` stands in `relation` to `groups[object]`."""

    subject: int
    relation: Relation
    object: int


def holds(subject: Group, relation: Relation, object: Group) -> bool:
    """Return whether every copy of `subject` stands in `relation` to every copy of `object`."""
    if relation in ("right of", "below"):
        return holds(object, INVERSE[relation], subject)
    if relation == "left of":
        return max(box.right for box in subject.boxes) <= min(box.left for box in object.boxes)
    return max(box.bottom for box in subject.boxes) <= min(box.top for box in object.boxes)


def facts(scene: Scene) -> tuple[Fact, ...]:
    """Return all relations between two groups of the scene, in both directions."""
    groups = scene.groups
    return tuple(
        Fact(i, relation, j)
        for i in range(len(groups))
        for j in range(len(groups))
        for relation in RELATIONS
        if i != j and holds(groups[i], relation, groups[j])
    )


def salient_relation(subject: Group, object: Group) -> Relation | None:
    """Return the relation along the larger distance, as a person would name it; None if there is none."""
    found = [relation for relation in RELATIONS if holds(subject, relation, object)]
    if not found:
        return None
    across, down = _centre(object, 0) - _centre(subject, 0), _centre(object, 1) - _centre(subject, 1)
    sideways = abs(across) >= abs(down)
    return min(found, key=lambda relation: (relation in ("left of", "right of")) != sideways)


def _centre(group: Group, axis: int) -> float:
    return sum(box[axis] + box[axis + 2] for box in group.boxes) / (2 * group.num_copies)
