"""Reads the `design` of a study file: a word, or one word with options.

    design: one_in
    design: {fractional_factorial: {resolution: 4}}

`design_keys` holds every design with its options; `moevlm list designs` and `moevlm describe DESIGN` print them.
Inside a product every part names its factors: a new factor goes only where its author puts it.
"""

from typing import cast

import yaml

from lightning_moevlm.common.nearest_name import suggest
from lightning_moevlm.study.declare.arm_changes import read_changes
from lightning_moevlm.study.declare.decode import Positive, decode, decode_value, describe_keys
from lightning_moevlm.study.declare.designs import design as designs
from lightning_moevlm.study.declare.designs.cures import read_cures
from lightning_moevlm.study.declare.designs.design import Design, Kind, num_combinations
from lightning_moevlm.study.declare.designs.design_keys import (
    DESIGNS,
    LADDER_RATES,
    CureKeys,
    DesignKeys,
    FractionKeys,
    RateKeys,
    SizeKeys,
)
from lightning_moevlm.study.declare.designs.fraction import Fraction, find_fraction, generate_fraction
from lightning_moevlm.study.declare.factors import Factor, Level, read_levels, refuse_conflicts
from lightning_moevlm.study.declare.yaml_nodes import YamlNode

LADDERS: dict[Kind, str] = {"lr_sensitivity": "lr", "size_ladder": "size"}
"""Designs that bring a factor of their own, and its name."""

_SWITCHES_ONLY: tuple[Kind, ...] = ("leave_one_out", "factorial", "fractional_factorial", "cures")
_MOST_POINTS = 1024
_MOST_IN_FRACTION = 15


def read_design(node: YamlNode, factors: tuple[Factor, ...]) -> Design:
    """Read a design over the factors of a study.

    Raises:
        UserError: one line with file, line, key and what is allowed.
    """
    design = _design(node, factors, in_product=False)
    used = {factor.name for factor in design.factors}
    for factor in factors:
        if factor.name not in used:
            raise node.error(f"the design leaves out factor {factor.name!r}; name it under `factors`, or remove it")
    if design.kind != "cures":  # a cure may set what the illness sets
        refuse_conflicts(design.factors)
    return design


def _design(node: YamlNode, factors: tuple[Factor, ...], in_product: bool) -> Design:
    kind, options = _kind(node)
    if kind == "product":
        return _product(options, factors, in_product)
    page = DESIGNS[kind]
    lacks = ", ".join(one.key for one in describe_keys(page.options) if one.default == "required")
    if lacks and not options.is_filled_mapping:
        raise node.error(f"{kind} needs {lacks}, e.g. design: {page.example}; `moevlm describe {kind}` explains it")
    keys = decode(options, page.options) if options.is_filled_mapping else page.options()
    assert isinstance(keys, DesignKeys), "a product has been read above"
    if in_product and keys.factors is None:
        raise node.error(f"inside a product, {kind} names its factors: `factors: [...]`, or `[]` for a ladder alone")
    chosen = factors if keys.factors is None else _choose_factors(keys.factors, factors)
    if kind in LADDERS:
        chosen = (*chosen, _ladder(kind, node, keys, factors))
    if not chosen:
        raise node.error(f"{kind} needs factors; declare them under `factors` of the study")
    if kind in _SWITCHES_ONLY:
        _need_switches(kind, node, chosen)
    if kind in ("factorial", "grid", *LADDERS):
        _refuse_crowd(node, num_combinations(chosen))
    if kind == "one_in":
        return designs.one_in(chosen)
    if kind == "leave_one_out":
        return designs.leave_one_out(chosen)
    if isinstance(keys, CureKeys):
        if in_product:
            raise node.error("cures is a whole study, not a part of a product; declare one study per size or rate")
        return read_cures(options, keys, chosen)
    if isinstance(keys, FractionKeys):
        return designs.fractional(chosen, _fraction(node, options, keys, chosen))
    return designs.crossing(kind, chosen)


def _kind(node: YamlNode) -> tuple[Kind, YamlNode]:
    """Return the design and the node of its options (the word itself if there are none)."""
    if not node.is_filled_mapping:
        return cast(Kind, node.choice(designs.KINDS)), node
    children = node.items()
    word, options = children[0]
    if word not in designs.KINDS:
        hint = suggest(word, designs.KINDS)
        raise options.error(f"unknown design {word!r}; {hint}allowed here: {', '.join(designs.KINDS)}")
    if len(children) > 1:
        second = children[1]
        raise second[1].error(
            f"one design only, got {word!r} and {second[0]!r}; to combine them: product: [{{{word}: ...}}, ...]"
        )
    return word, options


def _product(node: YamlNode, factors: tuple[Factor, ...], in_product: bool) -> Design:
    if in_product:
        raise node.error("a product within a product is the same as one product; list all its parts in one")
    parts: list[Design] = []
    owner: dict[str, Kind] = {}
    for child in node.sequence():
        part = _design(child, factors, in_product=True)
        for factor in part.factors:
            if factor.name in owner:
                raise child.error(f"factor {factor.name!r} is varied by {owner[factor.name]} already; name it once")
            owner[factor.name] = part.kind
        parts.append(part)
    if len(parts) < 2:
        raise node.error("a product has two parts or more; write the one design without `product`")
    points = 1
    for part in parts:
        points *= len(part.points)
    _refuse_crowd(node, points)
    return designs.product(tuple(parts))


def _choose_factors(node: YamlNode, factors: tuple[Factor, ...]) -> tuple[Factor, ...]:
    by_name = {factor.name: factor for factor in factors}
    if node.plain() == []:
        return ()
    chosen: list[Factor] = []
    for child in node.sequence():
        factor = by_name[child.choice(tuple(by_name))]
        if factor in chosen:
            raise child.error(f"factor {factor.name!r} is named twice")
        chosen.append(factor)
    return tuple(chosen)


def _ladder(kind: Kind, node: YamlNode, keys: DesignKeys, factors: tuple[Factor, ...]) -> Factor:
    name = LADDERS[kind]
    for factor in factors:
        if factor.name == name:
            raise node.error(
                f"{kind} brings a factor {name!r} of its own; give yours in line {factor.line} another name"
            )
    if isinstance(keys, SizeKeys):
        return Factor(name, "size", read_levels(keys.levels), keys.levels.line)
    assert isinstance(keys, RateKeys)
    return Factor(name, "peak learning rate", _read_rates(node, keys), node.line)


def _read_rates(node: YamlNode, keys: RateKeys) -> tuple[Level, ...]:
    children = [_number_node(node, rate) for rate in LADDER_RATES] if keys.rates is None else keys.rates.sequence()
    levels: list[Level] = []
    before = 0.0
    for child in children:
        rate = decode_value(child, Positive)
        if rate <= before:
            raise child.error(f"rates ascend, got {rate:g} after {before:g}; put them in order, each once")
        before = rate
        levels.append(Level(rate_name(rate), f"learning rate {rate:g}", read_changes(keys.key, child)))
    if len(levels) < 2:
        raise children[0].error("a ladder has two rates or more; the published one is the default, leave `rates` out")
    return tuple(levels)


def rate_name(rate: float) -> str:
    """Return a learning rate as a name: 3e_4 for 0.0003, 2_5e_3 for 0.0025, 1 for 1."""
    digits, exponent = f"{rate:.6e}".split("e")
    digits = digits.rstrip("0").rstrip(".").replace(".", "_")
    power = int(exponent)
    if power > 0:
        return f"{rate:g}".replace(".", "_").replace("+", "")
    return f"{digits}e_{-power}" if power else digits


def _number_node(node: YamlNode, value: float) -> YamlNode:
    """Return a number as a node at the place of the design."""
    scalar = yaml.ScalarNode("tag:yaml.org,2002:float", repr(value), node.node.start_mark, node.node.end_mark)
    return YamlNode(node.file, node.key, scalar, node.line)


def _need_switches(kind: Kind, node: YamlNode, factors: tuple[Factor, ...]) -> None:
    for factor in factors:
        if not factor.is_switch:
            instead = "grid" if kind == "factorial" else "one_in"
            raise node.error(
                f"{kind} takes switches (`on` / `off`), and factor {factor.name!r} in line {factor.line} has the "
                f"levels {', '.join(level.name for level in factor.levels)}; make it a switch, or take {instead}"
            )


def _refuse_crowd(node: YamlNode, points: int) -> None:
    if points > _MOST_POINTS:
        raise node.error(
            f"this design has {points:,} arms, at most {_MOST_POINTS:,} are planned; take fractional_factorial or "
            "one_in, or vary fewer factors"
        )


def _fraction(node: YamlNode, options: YamlNode, keys: FractionKeys, factors: tuple[Factor, ...]) -> Fraction:
    names = tuple(factor.name for factor in factors)
    if (keys.resolution is None) == (keys.generators is None):
        raise node.error("fractional_factorial needs either `resolution` (3, 4 or 5) or `generators`")
    if len(names) > _MOST_IN_FRACTION:
        raise node.error(f"a fraction of {len(names)} factors, at most {_MOST_IN_FRACTION} are planned; vary fewer")
    if keys.generators is None:
        assert keys.resolution is not None
        found = find_fraction(names, keys.resolution)
        if found is None:
            raise options.child("resolution").error(
                f"no part of the {2 ** len(names)} combinations has resolution {keys.resolution}; take factorial, or a "
                "lower resolution"
            )
        _refuse_crowd(node, 2**found.num_basic)
        return found
    fraction = generate_fraction(names, _generators(keys.generators, names))
    if fraction.resolution < 3:
        word = " and ".join(fraction.words()[0])
        raise keys.generators.error(
            f"resolution {fraction.resolution}: {word} would always change together; choose generators that differ"
        )
    _refuse_crowd(node, 2**fraction.num_basic)
    return fraction


def _generators(node: YamlNode, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    children = node.items()
    generated = [name for name, _ in children]
    for name, child in children:
        if name not in names:
            raise child.error(f"unknown factor {name!r}; {suggest(name, names)}allowed here: {', '.join(names)}")
    basic = tuple(name for name in names if name not in generated)
    if not children or not basic:
        raise node.error("generators name some factors as products of others, e.g. {d: [a, b, c]}")
    result: dict[str, tuple[str, ...]] = {}
    for name, child in children:
        parts = tuple(part.choice(basic) for part in child.sequence())
        if len(set(parts)) < len(parts):
            raise child.error(f"a factor occurs twice in {', '.join(parts)}, which cancels out; name each once")
        result[name] = parts
    return result
