"""A declared study: one YAML file read into frozen records, or refused with file, line, key and nearest name.

    question: Does the router z-loss matter at this size?     # required
    hypothesis: ...   source: ...                             # optional texts
    base: [conf/quickstart.yaml]                              # LightningCLI files, later ones win
    baseline: baseline                                        # default: the first arm
    baseline_digest: 3f2a81c09d4e                             # refuse a baseline that has changed since: see pin.py
    arms:                                                     # either arms; here the baseline changes nothing
      baseline: {description: everything on}
      no_router_z: {model.losses.router_z: null}              # changes over the base; dotted keys are expanded
    factors: {router_z: {off: {model.losses.router_z: null}}} # or factors (factors.py) and a design (read_design.py)
    design: leave_one_out
    seeds: [0, 1, 2]
    budget: {max_steps: 200}                                  # or samples, active_flops, minutes: see budget.py
    match: active_flops                                       # refuse arms that differ from the baseline by over 1 %
    primary: {metric: val/task_loss, direction: lower}
    also: [val/accuracy_text]
    diverged: {metric: val/task_loss, times_untrained: 1.0, in_a_row: null}   # non-finite always counts as diverged
    stop_hopeless: {at_step: 100, worse_by: 0.5}              # withdraws arms far behind: see hopeless.py
    decide: {alpha: 0.05, test: t, correction: none, within: null}
    guard: [{metric: drop_rate/block1/text, at_most: 0.05}]   # may not get worse by more than this

What a study sets itself (seed, budget, logger, output folder) no arm may change, see changes.py.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args

from lightning_moevlm import keys
from lightning_moevlm.shipped import find_file, missing_file
from lightning_moevlm.study.budget import Budget, read_budget
from lightning_moevlm.study.changes import merged, read_changes
from lightning_moevlm.study.comparison import (
    Arm,
    Comparison,
    Correction,
    Decision,
    Direction,
    Divergence,
    Guard,
    Hopeless,
    Primary,
    Test,
)
from lightning_moevlm.study.design import REFERENCE, Design
from lightning_moevlm.study.digest import DIGITS
from lightning_moevlm.study.factors import read_factors
from lightning_moevlm.study.located import Located, nearest, read
from lightning_moevlm.study.read_design import read_design

Match = Literal["active_flops"]

_OPTIONAL = (
    *("hypothesis", "source", "arms", "factors", "design", "baseline", "match", "also", "diverged", "decide", "guard"),
    *("stop_hopeless", "baseline_digest"),
)
_MAY_STOP = ("one_in", "leave_one_out")
_NAME = re.compile(r"[a-z0-9][a-z0-9_]*", re.IGNORECASE)
_DIGEST = re.compile(rf"[0-9a-f]{{{DIGITS}}}")
_LONGEST_NAME = 64  # study, arm, seed and digest together name folders: 255 bytes on every common file system
_SEEDS_END = 2**32  # what NumPy and Lightning take


@dataclass(frozen=True)
class Pin:
    """The baseline that a study stands on, 12 hex digits; see `pin`. line: where the file says so, for messages."""

    digest: str
    line: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Study:
    """A study file as read.

    comparison: what is compared, and by which rules. file: where it was read; base: config files as the command line
    takes them; match: what every arm must share with the baseline; pin: the baseline must be this one.
    """

    comparison: Comparison
    file: Path
    base: tuple[Path, ...]
    budget: Budget
    match: Match | None = None
    pin: Pin | None = None


def read_study(file: Path) -> Study:
    """Read and check a study file.

    Raises:
        UserError: one line with file, line, key and what is allowed.
    """
    root = read(file)
    if not _NAME.fullmatch(file.stem):
        raise root.error(f"the file's name is the study's name: use letters, digits and _, not {file.stem!r}")
    if len(file.stem) > _LONGEST_NAME:
        raise root.error(
            f"the file's name is the study's name and has {len(file.stem)} characters; use at most {_LONGEST_NAME}"
        )
    top = root.fields(
        required=("question", "base", "seeds", "budget", "primary"),
        optional=_OPTIONAL,
    )
    design = _design(root, top)
    arms = _explicit_arms(top["arms"]) if design is None else _designed_arms(design, top["design"])
    primary = _primary(top["primary"])
    budget = read_budget(top["budget"])
    comparison = Comparison(
        name=file.stem,
        question=top["question"].text(),
        hypothesis=top["hypothesis"].text() if "hypothesis" in top else "",
        source=top["source"].text() if "source" in top else "",
        baseline=_baseline(top, arms, designed=design is not None),
        arms=arms,
        seeds=_seeds(top["seeds"]),
        spends=budget.words,
        equal_steps=budget.max_steps is not None,
        primary=primary,
        also=tuple(_metric(node) for node in top["also"].sequence()) if "also" in top else (),
        diverged=_divergence(top.get("diverged"), primary),
        decide=_decision(top.get("decide")),
        guard=tuple(_guard(node) for node in top["guard"].sequence()) if "guard" in top else (),
        design=design,
        stop_hopeless=_hopeless(top.get("stop_hopeless"), budget, design),
    )
    return Study(
        comparison,
        file,
        base=tuple(_config_file(node) for node in top["base"].sequence()),
        budget=budget,
        match=_match(top.get("match")),
        pin=_pin(top.get("baseline_digest")),
    )


def _design(root: Located, top: dict[str, Located]) -> Design | None:
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


def _explicit_arms(node: Located) -> tuple[Arm, ...]:
    arms = tuple(_arm(name, child) for name, child in node.items())
    if not arms:
        raise node.error("no arm declared; name a baseline and what it is compared with")
    return arms


def _arm(name: str, node: Located) -> Arm:
    if not _NAME.fullmatch(name):
        raise node.error(f"an arm's name is letters, digits and _, got {name!r}")
    if len(name) > _LONGEST_NAME:
        raise node.error(f"an arm's name has at most {_LONGEST_NAME} characters, this one has {len(name)}; shorten it")
    if node.is_null:
        return Arm(name, "", line=node.line)
    children = dict(node.items())
    described = children.pop("description", None)
    changes = merged(change for key, child in children.items() for change in read_changes(key, child))
    return Arm(name, described.text() if described else "", changes, node.line)


def _designed_arms(design: Design, node: Located) -> tuple[Arm, ...]:
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
        changes = merged(change for level in levels for change in level.changes)
        leaving = design.leaving(point)
        line = design.factor(leaving[0].factor).line if len(leaving) == 1 else node.line
        arms[name] = Arm(name, design.description(point), changes, line, point.levels)
    return tuple(arms.values())


def _baseline(top: dict[str, Located], arms: tuple[Arm, ...], designed: bool) -> str:
    names = tuple(arm.name for arm in arms)
    name = top["baseline"].choice(names) if "baseline" in top else names[0]
    if not designed and next(arm for arm in arms if arm.name == name).changes:
        node = dict(top["arms"].items())[name]
        raise node.error("the baseline changes nothing over the base; move its changes to a base file or another arm")
    return name


def _match(node: Located | None) -> Match | None:
    return None if node is None or node.is_null else cast(Match, node.choice(get_args(Match)))


def _config_file(node: Located) -> Path:
    """Find a base file: as given (from the working directory), beside the study file, or shipped with the package."""
    given = Path(node.text())
    beside = [node.file.parent]
    found = find_file(given, beside)
    if found is None:
        raise node.error(str(missing_file("configuration file", given, beside)))
    return found


def _seeds(node: Located) -> tuple[int, ...]:
    seeds: list[int] = []
    for child in node.sequence():
        seed = child.integer(least=0)
        if seed >= _SEEDS_END:
            raise child.error(f"expected a seed below 2**32 = {_SEEDS_END}, got {seed}; take a small one such as 0")
        if seed in seeds:
            raise child.error(f"seed {seed} occurs twice; every seed is one independent repetition")
        seeds.append(seed)
    return tuple(seeds)


def _metric(node: Located) -> str:
    name = node.text()
    if keys.declared(name) is None:
        # The usual fillings of the patterns are offered too, so that a slip in a real key finds the real key.
        stages = [m.pattern.replace("{stage}", stage) for m in keys.ALL for stage in ("val", "train")]
        hint = nearest(name, [*stages, *(m.pattern for m in keys.ALL)])
        raise node.error(f"unknown metric {name!r}; {hint}every metric is declared in lightning_moevlm/keys.py")
    return name


def _primary(node: Located) -> Primary:
    fields = node.fields(required=("metric",), optional=("direction",))
    return Primary(*_progress(fields))


def _guard(node: Located) -> Guard:
    fields = node.fields(required=("metric", "at_most"), optional=("direction",))
    metric, direction = _progress(fields)
    return Guard(metric, direction, fields["at_most"].amount())


def _progress(fields: dict[str, Located]) -> tuple[str, Direction]:
    """Return a metric and which way is progress: as the file says, else as keys.py declares."""
    metric = _metric(fields["metric"])
    if "direction" in fields:
        word = fields["direction"].choice(("lower", "higher"))
    else:
        declared = keys.declared(metric)
        word = declared.better if declared else "neither"
    if word == "neither":
        raise fields["metric"].error(
            f"{metric} has no better direction of its own; add `direction: lower` or `direction: higher`"
        )
    return metric, "lower" if word == "lower" else "higher"


def _divergence(node: Located | None, primary: Primary) -> Divergence:
    # what learns ends above the untrained model where higher is better: the loss tells a divergence there
    usual = primary.metric if primary.direction == "lower" else keys.TASK_LOSS.key(stage="val")
    if node is None:
        return Divergence(usual, times_untrained=1.0)
    fields = node.fields(required=(), optional=("metric", "times_untrained", "in_a_row"))
    in_a_row = fields.get("in_a_row")
    return Divergence(
        metric=_metric(fields["metric"]) if "metric" in fields else usual,
        times_untrained=fields["times_untrained"].number(above=0.0) if "times_untrained" in fields else 1.0,
        in_a_row=None if in_a_row is None or in_a_row.is_null else in_a_row.integer(least=1),
    )


def _hopeless(node: Located | None, budget: Budget, design: Design | None) -> Hopeless | None:
    if node is None or node.is_null:
        return None
    if design is not None and design.kind not in _MAY_STOP:
        raise node.error(
            f"a {design.kind} design needs every arm to its end; stop_hopeless goes with {', '.join(_MAY_STOP)} or "
            "`arms`"
        )
    fields = node.fields(required=("at_step", "worse_by"))
    step = fields["at_step"].integer(least=1)
    if budget.max_steps is None:
        raise node.error("stop_hopeless compares arms at one step; give the budget as max_steps")
    if step >= budget.max_steps:
        raise fields["at_step"].error(f"step {step} is not before the end, which is step {budget.max_steps}")
    return Hopeless(step, fields["worse_by"].number(above=0.0))


def _pin(node: Located | None) -> Pin | None:
    if node is None or node.is_null:
        return None
    digest = node.written()  # YAML would read 123456789012 and 12345678e012 as numbers
    if not _DIGEST.fullmatch(digest):
        raise node.error(f"expected the 12 hex digits that `moevlm sweep plan` prints, got {digest!r}")
    return Pin(digest, node.line)


def _decision(node: Located | None) -> Decision:
    if node is None:
        return Decision()
    usual = Decision()
    fields = node.fields(required=(), optional=("alpha", "test", "correction", "within"))
    within = fields.get("within")
    return Decision(
        alpha=fields["alpha"].number(above=0.0, below=1.0) if "alpha" in fields else usual.alpha,
        test=cast(Test, fields["test"].choice(get_args(Test))) if "test" in fields else usual.test,
        correction=cast(Correction, fields["correction"].choice(get_args(Correction)))
        if "correction" in fields
        else usual.correction,
        within=None if within is None or within.is_null else within.number(above=0.0),
    )
