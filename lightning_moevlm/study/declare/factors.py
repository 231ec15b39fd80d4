"""Reads factors: the settings that a designed study varies, each at two levels or more.

    factors:
      router_z:                                          # a switch; the level that is left out is the base
        description: z-loss on the router's logits
        on: {model.losses.router_z: {weight: 1.0e-3}}
      qk_norm:
        off: {model.backbone.init_args.stabilisers.qk_norm: false}
      router:                                            # several levels, the first is the reference
        levels:
          softmax: {}
          sigmoid: {model....router: {class_path: SigmoidBiasRouter}}

Two factors of one study never set the same key: their joint effect would depend on their order.
"""

import re
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, NamedTuple

from lightning_moevlm.study.declare.arm_changes import Change, merge, read_changes
from lightning_moevlm.study.declare.decode import Record, decode, doc, kind
from lightning_moevlm.study.declare.yaml_nodes import YamlNode

OFF, ON = "off", "on"
_CHANGES = "mapping of configuration keys, dotted or nested, to values"
Changes = Annotated[YamlNode, kind(_CHANGES)]
Description = Annotated[str, doc("Description for the report.", "Router logits may grow freely.")]


class FactorKeys(Record, frozen=True):
    """One factor: a switch (`on`, `off`) or `levels`."""

    description: Description = ""
    on: Annotated[
        YamlNode | None,
        doc("Changes if the switch is on.", "{model.losses.router_z: {weight: 1.0e-3}}", _CHANGES, "the base"),
    ] = None
    off: Annotated[
        YamlNode | None,
        doc("Changes if the switch is off.", "{model.losses.router_z: null}", _CHANGES, "the base"),
    ] = None
    levels: Annotated[
        YamlNode | None,
        doc(
            "Settings of a factor that is not a switch. The first one is the reference.",
            "{narrow: {}, wide: {model.backbone.init_args.hidden_dim: 512}}",
            "mapping of names to changes, at least two",
        ),
    ] = None


_NAME = re.compile(r"[a-z0-9]+(_[a-z0-9]+)*", re.IGNORECASE)


class FactorLevel(NamedTuple):
    """The level of one factor, by names."""

    factor: str
    level: str


@dataclass(frozen=True)
class Level:
    """One setting of a factor."""

    name: str  # in the names of arms
    description: str  # for the report
    changes: tuple[Change, ...]  # over the base; empty if it is the base


@dataclass(frozen=True)
class Factor:
    """A setting to vary."""

    name: str  # in the names of arms
    description: str  # for the report
    levels: tuple[Level, ...]  # at least two, the reference first (of a switch `off`)
    line: int  # in the study file, from 1

    @property
    def is_switch(self) -> bool:
        """Whether it is on or off."""
        return [level.name for level in self.levels] == [OFF, ON]

    def level(self, name: str) -> Level:
        """Return the level of that name."""
        return next(level for level in self.levels if level.name == name)


def read_factors(node: YamlNode) -> tuple[Factor, ...]:
    """Read the factors of a study file, in its order.

    Raises:
        UserError: one line with file, line, key and what is allowed.
    """
    return tuple(_factor(name, child) for name, child in node.items())


def read_levels(node: YamlNode) -> tuple[Level, ...]:
    """Read a mapping of named levels; at least two.

    Raises:
        UserError: one line with file, line, key and what is allowed.
    """
    levels = tuple(_level(name, child) for name, child in node.items())
    if len(levels) < 2:
        raise node.error(f"a factor has two levels or more, this one has {len(levels)}; add one, or use on / off")
    return levels


def refuse_conflicts(factors: tuple[Factor, ...], advice: str = "make them levels of one factor") -> None:
    """Refuse two factors that set the same key. advice: what the author should do.

    Raises:
        UserError: Names both places.
    """
    for one, two in combinations(factors, 2):
        for mine in _all_changes(one):
            for theirs in _all_changes(two):
                if mine.overlaps(theirs):
                    raise theirs.node.error(
                        f"factor {two.name!r} sets {theirs.key!r}, and factor {one.name!r} sets {mine.key!r} in line "
                        f"{mine.node.line}: together they would undo each other; {advice}"
                    )


def _factor(name: str, node: YamlNode) -> Factor:
    _check_name(name, "a factor", node)
    keys = decode(node, FactorKeys)
    if keys.levels is not None:
        if keys.on is not None or keys.off is not None:
            raise node.error("a factor has either `on` / `off` or `levels`; keep one of them")
        return Factor(name, keys.description, read_levels(keys.levels), node.line)
    if keys.on is None and keys.off is None:
        raise node.error("this factor changes nothing; say what it changes under `on`, `off` or `levels`")
    levels = tuple(
        Level(word, "", ()) if child is None else _level(word, child)
        for word, child in ((OFF, keys.off), (ON, keys.on))
    )
    if not any(level.changes for level in levels):
        raise node.error("this factor changes nothing, off and on are both the base; give a key and a value")
    return Factor(name, keys.description, levels, node.line)


def _level(name: str, node: YamlNode) -> Level:
    _check_name(name, "a level", node)
    if node.is_null:
        return Level(name, "", ())
    description, solve, changes = read_described_changes(node)
    if solve is not None:
        raise solve.error(
            "`solve` belongs to an arm of `arms`, and levels make several; list the arms, or set a number"
        )
    return Level(name, description, changes)


def read_described_changes(node: YamlNode) -> tuple[str, YamlNode | None, tuple[Change, ...]]:
    """Read the description, what is solved (None: nothing) and the changes of an arm or of a level.

    Raises:
        UserError: The changes contradict each other, or one of them is not allowed.
    """
    children = dict(node.items())
    described, solve = children.pop("description", None), children.pop("solve", None)
    changes = tuple(change for name, child in children.items() for change in read_changes(name, child))
    merge(changes)  # refuses contradictions
    return "" if described is None else described.text(), solve, changes


def _check_name(name: str, what: str, node: YamlNode) -> None:
    if not _NAME.fullmatch(name):
        raise node.error(f"the name of {what} is letters, digits and single _ between them, got {name!r}")


def _all_changes(factor: Factor) -> tuple[Change, ...]:
    return tuple(change for level in factor.levels for change in level.changes)
