"""A declared study: one YAML file read into frozen records, or refused with file, line, key and nearest name.

`study_keys` holds every key with its meaning and default. `moevlm describe study` prints them, `moevlm sweep new`
writes a file to start from.

What a study sets itself (seed, budget, logger, output folder) no arm may change, see changes.py.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_moevlm.common.digest import DIGITS
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.study.declare import study_keys as k
from lightning_moevlm.study.declare.arm_changes import merge, read_changes
from lightning_moevlm.study.declare.budget import Budget, read_budget
from lightning_moevlm.study.declare.comparison import (
    Arm,
    Comparison,
    Decision,
    Direction,
    Divergence,
    FutilityStop,
    Guard,
    Primary,
)
from lightning_moevlm.study.declare.design import REFERENCE, Design
from lightning_moevlm.study.declare.factors import DESCRIPTION, read_factors
from lightning_moevlm.study.declare.read_design import read_design
from lightning_moevlm.study.declare.yaml_nodes import YamlNode, read_yaml

_MAY_STOP = ("one_in", "leave_one_out")
_NAME = re.compile(r"[a-z0-9][a-z0-9_]*", re.IGNORECASE)
_DIGEST = re.compile(rf"[0-9a-f]{{{DIGITS}}}")
_LONGEST_NAME = 64  # study, arm, seed and digest together name folders: 255 bytes on every common file system


@dataclass(frozen=True)
class Pin:
    """The baseline that a study stands on, 12 hex digits; see `pin`. line: where the file says so, for messages."""

    digest: str
    line: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Study:
    """A study file as read.

    comparison: what is compared, and by which rules. file: where it was read; base: config files as the command line
    takes them; all_arms: nested config that goes over the base of every arm, below what the arm itself changes; match:
    what every arm must share with the baseline; pin: the baseline must be this one.
    """

    comparison: Comparison
    file: Path
    base: tuple[Path, ...]
    budget: Budget
    all_arms: dict[str, Any] = field(default_factory=dict)
    match: str | None = None
    pin: Pin | None = None


def read_study(file: Path) -> Study:
    """Read and check a study file.

    Raises:
        UserError: one line with file, line, key and what is allowed.
    """
    root = read_yaml(file)
    refuse_bad_name(file)
    top = k.STUDY_FILE.fields(root)
    design = _design(root, top)
    arms = _explicit_arms(top["arms"]) if design is None else _designed_arms(design, top["design"])
    primary = _primary(top["primary"])
    budget = read_budget(top["budget"])
    comparison = Comparison(
        name=file.stem,
        question=k.QUESTION.of(top),
        hypothesis=k.HYPOTHESIS.of(top),
        source=k.SOURCE.of(top),
        baseline=_baseline(top, arms, designed=design is not None),
        arms=arms,
        seeds=_seeds(top["seeds"]),
        spends=budget.text,
        equal_steps=budget.max_steps is not None,
        primary=primary,
        also=k.ALSO.of(top),
        diverged=_divergence(top.get("diverged"), primary),
        decide=_decision(top.get("decide")),
        guard=tuple(_guard(node) for node in top["guard"].sequence()) if "guard" in top else (),
        design=design,
        futility_stop=_futility_stop(k.FUTILITY_STOP.of(top), budget, design),
    )
    return Study(
        comparison,
        file,
        base=k.BASE.of(top),
        budget=budget,
        all_arms=_all_arms(top.get("all_arms")),
        match=k.MATCH.of(top),
        pin=_pin(k.BASELINE_DIGEST.of(top)),
    )


def refuse_bad_name(file: Path) -> None:
    """Refuse a file whose name cannot be a study's.

    Raises:
        UserError: it has other characters than letters, digits and _, or too many.
    """
    if not _NAME.fullmatch(file.stem):
        raise UserError(f"{file}: the file's name is the study's name: use letters, digits and _, not {file.stem!r}")
    if len(file.stem) > _LONGEST_NAME:
        raise UserError(
            f"{file}: the file's name is the study's name and has {len(file.stem)} characters; use at most "
            f"{_LONGEST_NAME}"
        )


def _design(root: YamlNode, top: dict[str, YamlNode]) -> Design | None:
    """Return the design, or None where the file lists its arms."""
    if "arms" in top:
        for word in ("factors", "design"):
            if word in top:
                raise top[word].error("a study has either `arms` or `factors` with a `design`; keep one of them")
        return None
    if "design" not in top:
        lacks = "a `design`, e.g. one_in" if "factors" in top else "`arms`, or `factors` and a `design`"
        raise root.error(f"the study names nothing to compare; it needs {lacks}")
    return read_design(top["design"], read_factors(top["factors"]) if "factors" in top else ())


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
    children = dict(node.items())
    description = DESCRIPTION.of(children)
    children.pop(DESCRIPTION.name, None)
    changes = merge(change for key, child in children.items() for change in read_changes(key, child))
    return Arm(name, description, changes, node.line)


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
        changes = merge(change for level in levels for change in level.changes)
        leaving = design.changed_levels(point)
        line = design.factor(leaving[0].factor).line if len(leaving) == 1 else node.line
        arms[name] = Arm(name, design.describe(point), changes, line, point.levels)
    return tuple(arms.values())


def _baseline(top: dict[str, YamlNode], arms: tuple[Arm, ...], designed: bool) -> str:
    names = tuple(arm.name for arm in arms)
    name = top["baseline"].choice(names) if "baseline" in top else names[0]
    if not designed and next(arm for arm in arms if arm.name == name).changes:
        node = dict(top["arms"].items())[name]
        raise node.error("the baseline changes nothing over the base; move its changes to a base file or another arm")
    return name


def _all_arms(node: YamlNode | None) -> dict[str, Any]:
    if node is None or node.is_null:
        return {}
    return merge(change for key, child in node.items() for change in read_changes(key, child))


def _seeds(node: YamlNode) -> tuple[int, ...]:
    seeds = k.SEEDS.value.read(node)
    for place, (child, seed) in enumerate(zip(node.sequence(), seeds, strict=True)):
        if seed in seeds[:place]:
            raise child.error(f"seed {seed} occurs twice; every seed is one independent repetition")
    return seeds


def _primary(node: YamlNode) -> Primary:
    return Primary(*_progress(k.PRIMARY_BLOCK.fields(node)))


def _guard(node: YamlNode) -> Guard:
    fields = k.GUARD_BLOCK.fields(node)
    metric, direction = _progress(fields)
    return Guard(metric, direction, k.AT_MOST.of(fields))


def _progress(fields: dict[str, YamlNode]) -> tuple[str, Direction]:
    """Return a metric and which way is progress: as the file says, else as keys.py declares."""
    metric = k.METRIC_NAME.of(fields)
    declared = metric_keys.find_metric(metric)
    word = k.DIRECTION.of(fields) or (declared.better if declared else "neither")
    if word == "neither":
        raise fields["metric"].error(
            f"{metric} has no better direction of its own; add `direction: lower` or `direction: higher`"
        )
    return metric, "lower" if word == "lower" else "higher"


def _divergence(node: YamlNode | None, primary: Primary) -> Divergence:
    # what learns ends above the untrained model where higher is better: the loss tells a divergence there
    usual = primary.metric if primary.direction == "lower" else metric_keys.TASK_LOSS.key(stage="val")
    fields = {} if node is None else k.DIVERGED_BLOCK.fields(node)
    return Divergence(
        metric=k.DIVERGED_METRIC.of(fields) or usual,
        times_untrained=k.TIMES_UNTRAINED.of(fields),
        in_a_row=k.IN_A_ROW.of(fields),
    )


def _futility_stop(node: YamlNode | None, budget: Budget, design: Design | None) -> FutilityStop | None:
    if node is None:
        return None
    if design is not None and design.kind not in _MAY_STOP:
        raise node.error(
            f"a {design.kind} design needs every arm to its end; futility_stop goes with {', '.join(_MAY_STOP)} or "
            "`arms`"
        )
    fields = k.FUTILITY_STOP_BLOCK.fields(node)
    step = k.AT_STEP.of(fields)
    if budget.max_steps is None:
        raise node.error("futility_stop compares arms at one step; give the budget as max_steps")
    if step >= budget.max_steps:
        raise fields["at_step"].error(f"step {step} is not before the end, which is step {budget.max_steps}")
    return FutilityStop(step, k.WORSE_BY.of(fields))


def _pin(node: YamlNode | None) -> Pin | None:
    if node is None:
        return None
    digest = node.raw_text()  # YAML would read 123456789012 and 12345678e012 as numbers
    if not _DIGEST.fullmatch(digest):
        raise node.error(f"expected the 12 hex digits that `moevlm sweep plan` prints, got {digest!r}")
    return Pin(digest, node.line)


def _decision(node: YamlNode | None) -> Decision:
    fields = {} if node is None else k.DECIDE_BLOCK.fields(node)
    return Decision(k.ALPHA.of(fields), k.TEST.of(fields), k.CORRECTION.of(fields), k.WITHIN.of(fields))
