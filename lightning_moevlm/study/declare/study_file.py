"""Reads a study file into frozen records, or refuses it with file, line, key and nearest name.

`study_keys` holds every key with its meaning and default. `moevlm describe study` prints them, `moevlm sweep new`
writes a file to start from. Arms may not change keys that the study sets itself, see `arm_changes`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_moevlm.common.digest import DIGITS
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.study.declare.arm_changes import Change, lay_over, merge, read_changes
from lightning_moevlm.study.declare.budget import Budget, check_budget
from lightning_moevlm.study.declare.claims import read_claims
from lightning_moevlm.study.declare.comparison import (
    Arm,
    Comparison,
    Direction,
    Divergence,
    FutilityStop,
    Guard,
    Primary,
    Solve,
)
from lightning_moevlm.study.declare.decode import decode
from lightning_moevlm.study.declare.designs.design import REFERENCE, Design
from lightning_moevlm.study.declare.designs.read_design import read_design
from lightning_moevlm.study.declare.did_not_learn import read_did_not_learn
from lightning_moevlm.study.declare.factors import read_described_changes, read_factors
from lightning_moevlm.study.declare.study_keys import DivergedKeys, GuardKeys, PrimaryKeys, StudyFile
from lightning_moevlm.study.declare.yaml_nodes import YamlNode, compose_yaml

_MAY_STOP = ("one_in", "leave_one_out")
_NAME = re.compile(r"[a-z0-9][a-z0-9_]*", re.IGNORECASE)
_DIGEST = re.compile(rf"[0-9a-f]{{{DIGITS}}}")
_LONGEST_NAME = 64  # study, arm, seed and digest together name folders: 255 bytes on every common file system


@dataclass(frozen=True)
class Pin:
    """The baseline that a study requires; see `plan/baseline_pin.py`."""

    digest: str  # 12 hex digits
    line: int = field(default=0, compare=False)  # in the study file, from 1; for messages


@dataclass(frozen=True)
class Study:
    """A study file as read."""

    comparison: Comparison  # arms, seeds and rules
    file: Path
    base: tuple[Path, ...]  # config files as the command line takes them
    budget: Budget  # of each run
    # nested config over the base of every arm, below the arm's own changes
    all_arms: dict[str, Any] = field(default_factory=dict)
    match: str | None = None  # quantity that every arm must share with the baseline
    pin: Pin | None = None  # the baseline that is required


def read_study(file: Path) -> Study:
    """Read and check a study file.

    Raises:
        UserError: one line with file, line, key and what is allowed.
    """
    root = compose_yaml(file)
    refuse_bad_name(file)
    keys = decode(root, StudyFile)
    check_budget(keys.budget, root.child("budget"))
    design = _design(root, keys)
    arms = _designed_arms(design, keys.design) if design and keys.design else _explicit_arms(root.child("arms"))
    primary = Primary(keys.primary.metric, _better(keys.primary, root.child("primary")))
    baseline = _baseline(keys, arms)
    comparison = Comparison(
        name=file.stem,
        question=keys.question,
        hypothesis=keys.hypothesis,
        source=keys.source,
        baseline=baseline,
        arms=arms,
        seeds=_check_seeds(keys.seeds, root.child("seeds"), design),
        spends=keys.budget.text,
        equal_steps=keys.budget.max_steps is not None,
        primary=primary,
        also=keys.also,
        diverged=_divergence(keys.diverged, primary),
        decide=keys.decide,
        guard=tuple(
            Guard(one.metric, _better(one, root.child("guard").sequence()[i]), one.at_most)
            for i, one in enumerate(keys.guard)
        ),
        design=design,
        futility_stop=keys.futility_stop and _check_futility(root.child("futility_stop"), keys, design),
        did_not_learn=None
        if keys.did_not_learn is None
        else read_did_not_learn(
            keys.did_not_learn, root.child("did_not_learn"), primary, baseline, arms, keys.budget.max_steps
        ),
        claims=read_claims(keys.claims, tuple(arm.name for arm in arms), baseline, primary.metric),
    )
    return Study(
        comparison,
        file,
        base=keys.base,
        budget=keys.budget,
        all_arms=_all_arms(keys.all_arms),
        match=keys.match,
        pin=None if keys.baseline_digest is None or keys.baseline_digest.is_null else _pin(keys.baseline_digest),
    )


def refuse_bad_name(file: Path) -> None:
    """Refuse a file whose name cannot be a study's.

    Raises:
        UserError: It has other characters than letters, digits and _, or too many.
    """
    if not _NAME.fullmatch(file.stem):
        raise UserError(f"{file}: the file's name is the study's name: use letters, digits and _, not {file.stem!r}")
    if len(file.stem) > _LONGEST_NAME:
        raise UserError(
            f"{file}: the file's name is the study's name and has {len(file.stem)} characters; use at most "
            f"{_LONGEST_NAME}"
        )


def _design(root: YamlNode, keys: StudyFile) -> Design | None:
    """Return the design, or None if the file lists its arms."""
    if keys.arms is not None:
        if (extra := keys.factors or keys.design) is not None:
            raise extra.error("a study has either `arms` or `factors` with a `design`; keep one of them")
        return None
    if keys.design is None:
        lacks = "`arms`, or `factors` and a `design`" if keys.factors is None else "a `design`, e.g. one_in"
        raise root.error(f"the study names nothing to compare; it needs {lacks}")
    return read_design(keys.design, () if keys.factors is None else read_factors(keys.factors))


def _explicit_arms(node: YamlNode) -> tuple[Arm, ...]:
    arms = tuple(_arm(name, child) for name, child in node.items())
    if not arms:
        raise node.error("no arm declared; name a baseline and what it is compared with")
    return arms


def _arm(name: str, node: YamlNode) -> Arm:
    if not _NAME.fullmatch(name):
        raise node.error(f"an arm's name is letters, digits and _, got {name!r}")
    if len(name) > _LONGEST_NAME:
        raise node.error(f"an arm's name has at most {_LONGEST_NAME} characters, this one has {len(name)}; shorten it")
    if node.is_null:
        return Arm(name, "", line=node.line)
    description, solve, changes = read_described_changes(node)
    return Arm(name, description, merge(changes), node.line, solve=None if solve is None else _solve(solve, changes))


def _solve(node: YamlNode, changes: Sequence[Change]) -> Solve:
    solve = decode(node, Solve)
    for change in changes:
        if change.key.replace(".init_args", "") == solve.key.replace(".init_args", ""):
            place = f"{change.key!r} in line {change.node.line}"
            raise node.child("key").error(f"the arm sets {place}; remove it, or do not solve it")
    return solve


def _designed_arms(design: Design, node: YamlNode) -> tuple[Arm, ...]:
    arms: dict[str, Arm] = {}
    for point in design.points:
        name = point.name or REFERENCE
        if len(name) > _LONGEST_NAME:
            raise node.error(
                f"the arm {name!r} has {len(name)} characters, at most {_LONGEST_NAME} are allowed; shorten the names "
                "of factors and levels"
            )
        if name in arms:
            raise node.error(f"two points of the design have the name {name!r}; rename a factor or a level")
        levels = [design.factor(here.factor).level(here.level) for here in point.levels]
        laid: tuple[Change, ...] = ()
        for level in levels:
            laid = lay_over(laid, level.changes)
        leaving = design.changed_levels(point)
        line = design.factor(leaving[0].factor).line if len(leaving) == 1 else node.line
        arms[name] = Arm(name, design.describe(point), merge(laid), line, point.levels)
    return tuple(arms.values())


def _baseline(keys: StudyFile, arms: tuple[Arm, ...]) -> str:
    names = tuple(arm.name for arm in arms)
    name = names[0] if keys.baseline is None else keys.baseline.choice(names)
    if keys.arms is not None and next(arm for arm in arms if arm.name == name).changes:
        raise keys.arms.child(name).error(
            "the baseline changes nothing over the base; move its changes to a base file or another arm"
        )
    for arm in arms:
        if arm.solve is None or keys.arms is None:
            continue
        place = keys.arms.child(arm.name).child("solve")
        if arm.name == name:
            raise place.error("the baseline is what the others are matched with; remove `solve` from it")
        if keys.match is None:
            raise place.error("nothing says what to match; add `match: active_flops` to the study")
    return name


def _all_arms(node: YamlNode | None) -> dict[str, Any]:
    if node is None or node.is_null:
        return {}
    return merge(change for key, child in node.items() for change in read_changes(key, child))


def _check_seeds(seeds: tuple[int, ...], node: YamlNode, design: Design | None) -> tuple[int, ...]:
    for place, (child, seed) in enumerate(zip(node.sequence(), seeds, strict=True)):
        if seed in seeds[:place]:
            raise child.error(f"seed {seed} occurs twice; every seed is one independent repetition")
        if design is not None and design.cure_study is not None and seed in design.cure_study.fresh_seeds:
            raise child.error(f"seed {seed} is one of `fresh_seeds` too; a repetition takes seeds of its own")
    return seeds


def _better(keys: PrimaryKeys | GuardKeys, node: YamlNode) -> Direction:
    """Return which way is progress: as the file says, else as the metric is declared."""
    declared = metric_keys.find_metric(keys.metric)
    word = keys.direction or (declared.better if declared else "neither")
    if word == "neither":
        raise node.child("metric").error(
            f"it is not declared whether lower or higher {keys.metric} is better; add `direction: lower` or "
            "`direction: higher`"
        )
    return "lower" if word == "lower" else "higher"


def _divergence(keys: DivergedKeys, primary: Primary) -> Divergence:
    # if higher is better, training ends above the untrained model: the loss shows a divergence there
    usual = primary.metric if primary.direction == "lower" else metric_keys.TASK_LOSS.key(stage="val")
    return Divergence(keys.metric or usual, keys.times_untrained, keys.in_a_row)


def _check_futility(node: YamlNode, keys: StudyFile, design: Design | None) -> FutilityStop:
    rule, last = keys.futility_stop, keys.budget.max_steps
    assert rule is not None
    if design is not None and design.kind not in _MAY_STOP:
        raise node.error(
            f"a {design.kind} design needs every arm to its end; futility_stop goes with {', '.join(_MAY_STOP)} or "
            "`arms`"
        )
    if last is None:
        raise node.error("futility_stop compares arms at one step; give the budget as max_steps")
    if rule.at_step >= last:
        raise node.child("at_step").error(f"step {rule.at_step} is not before the end, which is step {last}")
    return rule


def _pin(node: YamlNode) -> Pin:
    digest = node.raw_text()  # YAML would read 123456789012 and 12345678e012 as numbers
    if not _DIGEST.fullmatch(digest):
        raise node.error(f"expected the 12 hex digits that `moevlm sweep plan` prints, got {digest!r}")
    return Pin(digest, node.line)
