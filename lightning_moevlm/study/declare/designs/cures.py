"""Makes the arms of a cure study: a healthy model, the same model sick, and both with cures.

    design:
      cures:
        illness: [conf/illnesses/attention_logits.yaml]
        dose: {model.optimizer.init_args.lr: 2.0e-2}

The factors are the cures. The design brings the factor `illness`. The illness is laid over the base, and cures over the
illness, so a cure may set what the illness has set. Healthy arms do not depend on the illness: studies with the same
base, seeds and budget share their runs.
"""

from collections.abc import Sequence

from lightning_moevlm.common.nearest_name import suggest
from lightning_moevlm.study.declare.arm_changes import Change, lay_over, merge, read_changes
from lightning_moevlm.study.declare.designs.design import CureStudy, Design, Point, Recommendation
from lightning_moevlm.study.declare.designs.design_keys import CureKeys
from lightning_moevlm.study.declare.factors import OFF, ON, Factor, FactorLevel, Level, refuse_conflicts
from lightning_moevlm.study.declare.yaml_nodes import YamlNode, compose_yaml

ILLNESS = "illness"
"""Name of the factor that the design brings."""
HEALTHY, SICK = "healthy", "sick"
"""Names of the arms without a cure."""

_ALL = "all"
_Names = tuple[str, ...]


def read_cures(node: YamlNode, keys: CureKeys, cures: tuple[Factor, ...]) -> Design:
    """Read the design over the cures of a study. node: the design's name; for errors.

    Raises:
        UserError: One line with file, line, key and what is allowed.
    """
    names = tuple(cure.name for cure in cures)
    for cure in cures:
        if cure.name in (ILLNESS, _ALL):
            raise node.error(f"a cure may not have the name {cure.name!r} (line {cure.line}); rename it")
        if cure.level(OFF).changes:
            raise node.error(f"cure {cure.name!r} (line {cure.line}) sets `off`; healthy is the base: give `on` alone")
    everything = _choose(keys.all, names, names)
    together = () if keys.together is None else tuple(_choose(one, names, ()) for one in keys.together.sequence())
    for place, combination in enumerate(together):
        if len(combination) < 2:
            assert keys.together is not None
            raise keys.together.sequence()[place].error("a combination has two cures or more; one alone has an arm")
    for combination in (everything, *together):
        refuse_conflicts(
            tuple(cure for cure in cures if cure.name in combination),
            "leave one out of `all`, or of the combination",
        )
    sick = {
        SICK: (),
        **{f"{SICK}__{name}": (name,) for name in names},
        **{f"{SICK}__{'__'.join(combination)}": combination for combination in together},
        **({f"{SICK}__{_ALL}": everything} if everything else {}),
        **{
            f"{SICK}__{_ALL}_but_{name}": tuple(other for other in everything if other != name)
            for name in _choose(keys.all_but, everything, everything)
        },
    }
    healthy = {HEALTHY: (), **{f"{HEALTHY}__{name}": (name,) for name in _choose(keys.on_healthy, names, names)}}
    factors = (_illness(keys), *cures)
    points = [
        _point(HEALTHY, factors, ()),
        *(_point(name, factors, (ILLNESS, *on)) for name, on in sick.items()),
        *(_point(name, factors, on) for name, on in healthy.items() if on),
    ]
    first = {point.levels: point for point in reversed(points)}  # with two cures, all but one is the other alone
    return Design(
        "cures",
        factors,
        tuple(point for point in points if first[point.levels] is point),
        cure_study=CureStudy(
            keys.signs,
            keys.fresh_seeds,
            _read_fresh_arms(keys, tuple(sick)[1:]),
            _read_recommendations(keys.recommendations, names),
        ),
    )


def _point(name: str, factors: Sequence[Factor], on: Sequence[str]) -> Point:
    return Point(name, tuple(FactorLevel(factor.name, ON if factor.name in on else OFF) for factor in factors))


def _illness(keys: CureKeys) -> Factor:
    """Return the illness as a switch: its files, then its dose."""
    parts = [_read_overlay(compose_yaml(file)) for file in keys.illness]
    if keys.dose is not None:
        parts.append(_read_overlay(keys.dose))
    changes: tuple[Change, ...] = ()
    for part in parts:
        changes = lay_over(changes, part)
    names = " and ".join(file.stem for file in keys.illness)
    return Factor(ILLNESS, f"the illness {names}", (Level(OFF, "", ()), Level(ON, "", changes)), parts[0][0].node.line)


def _read_overlay(node: YamlNode) -> tuple[Change, ...]:
    changes = tuple(change for name, child in node.items() for change in read_changes(name, child))
    merge(changes)  # refuses contradictions
    if not changes:
        raise node.error("it changes nothing; give a key and a value")
    return changes


def _read_recommendations(node: YamlNode | None, names: _Names) -> tuple[Recommendation, ...] | None:
    """Return the recommended cures with their sources; None if the study does not name any list."""
    if node is None:
        return None
    for name, child in node.items():
        if name not in names:
            raise child.error(f"no cure {name!r} is tried here; {suggest(name, names)}allowed: {', '.join(names)}")
    return tuple(Recommendation(name, child.text()) for name, child in node.items())


def _read_fresh_arms(keys: CureKeys, sick: _Names) -> _Names:
    """Return the arms that are repeated in any case. sick: those with cures."""
    if keys.fresh_arms is None:
        return ()
    if not keys.fresh_seeds:
        raise keys.fresh_arms.error("there are no seeds to repeat them on; give `fresh_seeds` too")
    return _choose(keys.fresh_arms, sick, ())


def _choose(node: YamlNode | None, allowed: _Names, default: _Names) -> _Names:
    """Return the names of a list, in the order of the allowed ones; [] is none."""
    if node is None:
        return default
    if node.plain() == []:
        return ()
    chosen = [child.choice(allowed) for child in node.sequence()]
    for place, child in enumerate(node.sequence()):
        if chosen[place] in chosen[:place]:
            raise child.error(f"{chosen[place]!r} is named twice")
    return tuple(name for name in allowed if name in chosen)
