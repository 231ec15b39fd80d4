"""Every key of a study file: what it takes, its unit, its meaning, its default. The reader takes them from here.

Designs have keys of their own, see `design_keys`; what arms change are keys of a run's configuration.
"""

from pathlib import Path
from typing import get_args

from lightning_moevlm.common.digest import DIGITS
from lightning_moevlm.common.nearest_name import suggest
from lightning_moevlm.common.shipped_files import describe_missing_file, find_file
from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.study.declare.comparison import Correction, Decision, Direction, Test
from lightning_moevlm.study.declare.factors import CHANGES, DESCRIPTION, FACTOR_BLOCK
from lightning_moevlm.study.declare.schema import (
    AMOUNT,
    TEXT,
    Block,
    Key,
    Value,
    list_of,
    node_of,
    number,
    one_of,
    whole,
)
from lightning_moevlm.study.declare.yaml_nodes import YamlNode

MATCHES = ("active_flops",)
_SEEDS_END = 2**32  # what NumPy and Lightning take


def _metric(node: YamlNode) -> str:
    name = node.text()
    if metric_keys.find_metric(name) is None:
        # The usual fillings of the patterns are offered too, so that a slip in a real key finds the real key.
        stages = [m.pattern.replace("{stage}", stage) for m in metric_keys.ALL for stage in ("val", "train")]
        hint = suggest(name, [*stages, *(m.pattern for m in metric_keys.ALL)])
        raise node.error(f"unknown metric {name!r}; {hint}`moevlm list metrics` shows every metric")
    return name


def _config_file(node: YamlNode) -> Path:
    """Find a base file: as given (from the working directory), beside the study file, or shipped with the package."""
    given = Path(node.text())
    beside = [node.file.parent]
    found = find_file(given, beside)
    if found is None:
        raise node.error(str(describe_missing_file("configuration file", given, beside)))
    return found


def _seed(node: YamlNode) -> int:
    seed = node.integer(least=0)
    if seed >= _SEEDS_END:
        raise node.error(f"expected a seed below 2**32 = {_SEEDS_END}, got {seed}; take a small one such as 0")
    return seed


METRIC: Value[str] = Value("metric, see `moevlm list metrics`", _metric)
_USUAL = Decision()

QUESTION = Key(
    "question",
    TEXT,
    "What the study asks. The report's headline.",
    "Does the router z-loss matter at this size?",
    is_required=True,
)
HYPOTHESIS = Key(
    "hypothesis",
    TEXT,
    "What you expect, written before the runs.",
    "It makes no difference that three seeds can show.",
    default="",
)
SOURCE = Key("source", TEXT, "Where the question comes from.", "ST-MoE (arXiv 2202.08906)", default="")
BASE = Key(
    "base",
    list_of(Value("configuration file", _config_file)),
    "Configurations of one run, as `moevlm fit -c` takes them. Later files win.",
    "[conf/quickstart.yaml]",
    is_required=True,
)
ALL_ARMS = Key(
    "all_arms",
    CHANGES,
    "Changes over the base for every arm. An arm's own change of the same key wins. Part of each run's digest, as if a "
    "base file said it.",
    "{data.root: data/shards/scenes}",
)
ARMS = Key(
    "arms",
    node_of("mapping of names to changes"),
    "What is compared: each arm's changes over the base. One arm changes nothing, the baseline. Give either `arms` or "
    "`factors` with a `design`.",
    "\n  baseline: {description: As the base says.}\n  no_router_z: {description: Router logits may grow freely., "
    "model.losses.router_z: null}",
    default_words="made by the design",
)
BASELINE = Key(
    "baseline",
    node_of("name of an arm"),
    "The arm that the others are compared with.",
    "baseline",
    default_words="the first arm",
)
BASELINE_DIGEST: Key[YamlNode | None] = Key(
    "baseline_digest",
    node_of(f"text of {DIGITS} hex digits, as `moevlm sweep plan` prints"),
    "Refuse the study once its baseline resolves to something else.",
    "null",
)
FACTORS = Key(
    "factors",
    node_of("mapping of names to factors"),
    "What a design varies. See `factors.NAME`.",
    "\n  router_z: {off: {model.losses.router_z: null}}\n  qk_norm: "
    "{off: {model.backbone.init_args.stabilisers.qk_norm: false}}",
)
DESIGN = Key(
    "design",
    node_of("name of a design, or {NAME: options}"),
    "Which combinations of the factors are arms. See `moevlm list designs`.",
    "factorial",
)
SEEDS = Key(
    "seeds",
    list_of(Value("whole number from 0 to 2**32 - 1", _seed)),
    "Repetitions of every arm. Arms share a seed's initial weights, masks and data order.",
    "[0, 1, 2]",
    is_required=True,
)
BUDGET = Key(
    "budget", node_of("mapping"), "What each run may spend. See `budget`.", "{max_steps: 60}", is_required=True
)
MATCH: Key[str | None] = Key(
    "match", one_of(MATCHES), "Refuse arms that differ from the baseline in this by more than 1 %.", "active_flops"
)
PRIMARY = Key(
    "primary",
    node_of("mapping"),
    "The metric that decides. See `primary`.",
    "{metric: val/task_loss}",
    is_required=True,
)
ALSO = Key("also", list_of(METRIC), "Further metrics to report, without a verdict.", "[val/accuracy_text]", default=())
DIVERGED = Key(
    "diverged",
    node_of("mapping"),
    "When a run counts as diverged. See `diverged`.",
    "{times_untrained: 1.0}",
    default_words="as described there",
)
FUTILITY_STOP: Key[YamlNode | None] = Key(
    "futility_stop",
    node_of("mapping"),
    "Withdraw arms that are far behind early. See `futility_stop`.",
    "{at_step: 30, worse_by: 0.5}",
)
DECIDE = Key(
    "decide",
    node_of("mapping"),
    "How verdicts are reached. See `decide`.",
    "{alpha: 0.05}",
    default_words="as described there",
)
GUARD = Key(
    "guard",
    node_of("list of mappings"),
    "Metrics that may not get worse. See `guard`.",
    "[{metric: drop_rate/block1/text, at_most: 0.05}]",
    default=(),
)

METRIC_NAME = Key("metric", METRIC, "The metric.", "val/task_loss", is_required=True)
DIRECTION = Key(
    "direction",
    one_of(get_args(Direction)),
    "Which way is better.",
    "lower",
    default_words="as the metric is declared; required where it declares none",
)
MAX_STEPS: Key[int | None] = Key("max_steps", whole(least=1), "Optimiser steps of a run.", "60")
SAMPLES: Key[int | None] = Key(
    "samples", whole(least=1), "Training samples of a run. Its steps follow from the batch size.", "1920"
)
ACTIVE_FLOPS: Key[float | None] = Key(
    "active_flops",
    number(above=0.0),
    "Floating-point operations of a run, forward and backward, of the parameters that a token uses. Steps follow.",
    "1.0e+12",
)
MINUTES: Key[float | None] = Key("minutes", number(above=0.0), "Minutes of training of a run, by the clock.", "5")
AT_MOST = Key(
    "at_most",
    AMOUNT,
    "How much worse than the baseline the metric may get on average, in its unit.",
    "0.05",
    is_required=True,
)
DIVERGED_METRIC: Key[str | None] = Key(
    "metric",
    METRIC,
    "The metric that is watched.",
    "val/task_loss",
    default_words="the primary one if lower is better, else val/task_loss",
)
TIMES_UNTRAINED = Key(
    "times_untrained",
    number(above=0.0),
    "Largest last value, as a multiple of the untrained model's.",
    "1.0",
    default=1.0,
)
IN_A_ROW: Key[int | None] = Key(
    "in_a_row",
    whole(least=1),
    "Stop a run after so many validations in a row above that.",
    "null",
    default_words="none: the last value alone decides",
)
AT_STEP = Key(
    "at_step", whole(least=1), "Optimiser step at which arms are held against the baseline.", "30", is_required=True
)
WORSE_BY = Key(
    "worse_by",
    number(above=0.0),
    "Withdraw an arm that is behind by more, in the primary metric's unit.",
    "0.5",
    is_required=True,
)
ALPHA = Key(
    "alpha",
    number(above=0.0, below=1.0),
    "Two-sided error rate. Intervals cover 1 - alpha.",
    "0.05",
    default=_USUAL.alpha,
)
TEST: Key[Test] = Key("test", one_of(get_args(Test)), "Paired test that decides.", "t", default=_USUAL.test)
CORRECTION: Key[Correction] = Key(
    "correction",
    one_of(get_args(Correction)),
    "Correction of p for the number of comparisons.",
    "none",
    default=_USUAL.correction,
)
WITHIN: Key[float | None] = Key(
    "within",
    number(above=0.0),
    "Largest difference that does not matter, in the primary metric's unit.",
    "null",
    default_words="none: no verdict says `no difference`",
)

STUDY_FILE = Block(
    "",
    "The file. Its name without .yaml is the study's name.",
    (
        *(QUESTION, HYPOTHESIS, SOURCE, BASE, ALL_ARMS, ARMS, FACTORS, DESIGN, BASELINE, BASELINE_DIGEST),
        *(SEEDS, BUDGET, MATCH, PRIMARY, ALSO, GUARD, DIVERGED, FUTILITY_STOP, DECIDE),
    ),
)
ARM_BLOCK = Block("arms.NAME", "One arm: its description and any keys of a configuration.", (DESCRIPTION,))
BUDGET_BLOCK = Block("budget", "Exactly one of these.", (MAX_STEPS, SAMPLES, ACTIVE_FLOPS, MINUTES))
PRIMARY_BLOCK = Block("primary", "The metric that decides.", (METRIC_NAME, DIRECTION))
GUARD_BLOCK = Block("guard[]", "A metric that may not get worse.", (METRIC_NAME, AT_MOST, DIRECTION))
DIVERGED_BLOCK = Block(
    "diverged", "A value that is not finite always counts as diverged.", (DIVERGED_METRIC, TIMES_UNTRAINED, IN_A_ROW)
)
FUTILITY_STOP_BLOCK = Block(
    "futility_stop", "An arm that is withdrawn gets no verdict. Needs a budget of max_steps.", (AT_STEP, WORSE_BY)
)
DECIDE_BLOCK = Block("decide", "How verdicts are reached.", (ALPHA, TEST, CORRECTION, WITHIN))
BLOCKS = (
    *(STUDY_FILE, ARM_BLOCK, FACTOR_BLOCK, BUDGET_BLOCK, PRIMARY_BLOCK, GUARD_BLOCK, DIVERGED_BLOCK),
    *(FUTILITY_STOP_BLOCK, DECIDE_BLOCK),
)
