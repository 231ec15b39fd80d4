"""Every key of a study file: type, bounds, meaning, default and an example.

Designs have keys of their own, see `design_keys`. What arms change are keys of a run's configuration.
"""

from typing import Annotated, Literal

from lightning_moevlm.common.digest import DIGITS
from lightning_moevlm.study.declare.budget import Budget
from lightning_moevlm.study.declare.claims import ClaimKeys
from lightning_moevlm.study.declare.comparison import Decision, Direction, FutilityStop, Solve
from lightning_moevlm.study.declare.decode import Positive, Record, Whole, doc, kind
from lightning_moevlm.study.declare.factors import Changes, Description, FactorKeys
from lightning_moevlm.study.declare.value_types import ConfigFile, Metric, Seed
from lightning_moevlm.study.declare.yaml_nodes import YamlNode

Amount = Annotated[float, kind("number >= 0", ge=0)]
Share = Annotated[float, kind("number above 0, at most 1", gt=0, le=1)]
BetterDirection = Annotated[
    Direction | None,
    doc("Direction of improvement.", "lower", default="as the metric is declared; required where it declares none"),
]


class ArmKeys(Record, frozen=True):
    """One arm: its description and any keys of a configuration."""

    description: Description = ""
    solve: Annotated[
        Solve | None,
        doc(
            "Find the number of one option at which the arm has the baseline's active FLOPs. Its keys are below.",
            "{key: model.backbone.init_args.hidden_dim}",
            "mapping",
        ),
    ] = None


class PrimaryKeys(Record, frozen=True):
    """The metric that decides."""

    metric: Annotated[Metric, doc("Key of the metric; `moevlm list metrics` lists them.", "val/task_loss")]
    direction: BetterDirection = None


class GuardKeys(PrimaryKeys, frozen=True, kw_only=True):
    """A metric that may not get worse."""

    at_most: Annotated[Amount, doc("Largest average worsening against the baseline, in the metric's unit.", "0.05")]


class DivergedKeys(Record, frozen=True):
    """A value that is not finite always counts as diverged."""

    metric: Annotated[
        Metric | None,
        doc(
            "The metric that is watched.",
            "val/task_loss",
            default="the primary one if lower is better, else val/task_loss",
        ),
    ] = None
    times_untrained: Annotated[
        Positive,
        doc("A run has diverged if its last value exceeds this multiple of the untrained model's value.", "1.0"),
    ] = 1.0
    in_a_row: Annotated[
        Whole | None,
        doc(
            "Stop a run after this many validations in a row above `times_untrained`.",
            "null",
            default="none: the last value alone decides",
        ),
    ] = None


class DidNotLearnKeys(Record, frozen=True):
    """A run that reached its end counts as failed if one of the rules holds. At least one is needed."""

    metric: Annotated[Metric | None, doc("The metric that is judged.", "val/task_loss", default="the primary one")] = (
        None
    )
    share_of_healthy: Annotated[
        Share | None,
        doc(
            "Least share, to be reached, of the healthy arm's way from untrained model to end, at the same seed.", "0.8"
        ),
    ] = None
    healthy: Annotated[
        YamlNode | None,
        doc("The arm whose progress is the measure.", "baseline", "name of an arm", "the baseline"),
    ] = None
    no_better_than: Annotated[
        Metric | None,
        doc(
            "Metric of a constant answer, which must be beaten at the end. Needs `metric` in the same unit.",
            "val/majority_text",
        ),
    ] = None
    stalled_steps: Annotated[
        Whole | None,
        doc("Optimiser steps at the end that may not pass without a new best value.", "200"),
    ] = None


class StudyFile(Record, frozen=True, kw_only=True):
    """The file. Its name without .yaml is the study's name."""

    question: Annotated[
        str, doc("Question of the study, and headline of its report.", "Does the router z-loss matter at this size?")
    ]
    hypothesis: Annotated[
        str, doc("Expected result, written before the runs.", "It makes no difference that three seeds can show.")
    ] = ""
    source: Annotated[str, doc("Origin of the question.", "ST-MoE (arXiv 2202.08906)")] = ""
    base: Annotated[
        tuple[ConfigFile, ...],
        doc("Configurations of one run, as `moevlm fit -c` takes them. Later files win.", "[conf/quickstart.yaml]"),
    ]
    all_arms: Annotated[
        Changes | None,
        doc(
            "Changes over the base for every arm. An arm's own change of the same key wins. Part of each run's digest, "
            "as if a base file said it.",
            "{data.root: data/shards/scenes}",
        ),
    ] = None
    arms: Annotated[
        YamlNode | None,
        doc(
            "Arms by name: each arm's changes over the base. One arm changes nothing, the baseline. Give either "
            "`arms` or `factors` with a `design`.",
            "\n  baseline: {description: As the base says.}\n  no_router_z: {description: Router logits may grow "
            "freely., model.losses.router_z: null}",
            "mapping of names to changes",
            "made by the design",
        ),
    ] = None
    factors: Annotated[
        YamlNode | None,
        doc(
            "Factors that the design varies. Their keys are below.",
            "\n  router_z: {off: {model.losses.router_z: null}}\n  qk_norm: "
            "{off: {model.backbone.init_args.stabilisers.qk_norm: false}}",
            "mapping of names to factors",
        ),
    ] = None
    design: Annotated[
        YamlNode | None,
        doc(
            "Combinations of the factors that become arms. See `moevlm list designs`.",
            "factorial",
            "name of a design, or {NAME: options}",
        ),
    ] = None
    baseline: Annotated[
        YamlNode | None,
        doc("The arm that the others are compared with.", "baseline", "name of an arm", "the first arm"),
    ] = None
    baseline_digest: Annotated[
        YamlNode | None,
        doc(
            "Refuse the study once its baseline resolves to something else.",
            "null",
            f"text of {DIGITS} hex digits, as `moevlm sweep plan` prints",
        ),
    ] = None
    seeds: Annotated[
        tuple[Seed, ...],
        doc("Repetitions of every arm. Arms share a seed's initial weights, masks and data order.", "[0, 1, 2]"),
    ]
    budget: Annotated[Budget, doc("Budget of each run. Its keys are below.", "{max_steps: 60}", "mapping")]
    match: Annotated[
        Literal["active_flops"] | None,
        doc(
            "Refuse arms that differ from the baseline in this by more than 1 %; `solve` of an arm reaches it.",
            "active_flops",
        ),
    ] = None
    primary: Annotated[
        PrimaryKeys, doc("The metric that decides. Its keys are below.", "{metric: val/task_loss}", "mapping")
    ]
    also: Annotated[
        tuple[Metric, ...], doc("Further metrics to report, without a verdict.", "[val/accuracy_text]")
    ] = ()
    guard: Annotated[
        tuple[GuardKeys, ...],
        doc(
            "Metrics that may not get worse. Their keys are below.",
            "[{metric: drop_rate/block1/text, at_most: 0.05}]",
            "list of mappings",
        ),
    ] = ()
    diverged: Annotated[
        DivergedKeys,
        doc(
            "Rule by which a run counts as diverged. Its keys are below.",
            "{times_untrained: 1.0}",
            "mapping",
            "see its keys",
        ),
    ] = DivergedKeys()
    did_not_learn: Annotated[
        DidNotLearnKeys | None,
        doc(
            "Rules by which a run that did not diverge counts as failed all the same. Its keys are below.",
            "{share_of_healthy: 0.8}",
            "mapping",
            "none: a run that did not diverge has learned",
        ),
    ] = None
    claims: Annotated[
        YamlNode | None,
        doc(
            "Published results that the study tests: each is reproduced, not seen or reversed. Their keys are below.",
            "[{says: The z-loss costs no quality., arm: no_router_z, expect: same, within: 0.05}]",
            "list of mappings",
            "none",
        ),
    ] = None
    futility_stop: Annotated[
        FutilityStop | None,
        doc("Withdraw arms that are far behind early. Its keys are below.", "{at_step: 30, worse_by: 0.5}", "mapping"),
    ] = None
    decide: Annotated[
        Decision, doc("Rule for verdicts. Its keys are below.", "{alpha: 0.05}", "mapping", "see its keys")
    ] = Decision()


RECORDS: dict[str, type[Record]] = {
    "": StudyFile,
    "arms.NAME": ArmKeys,
    "arms.NAME.solve": Solve,
    "factors.NAME": FactorKeys,
    "budget": Budget,
    "primary": PrimaryKeys,
    "guard[]": GuardKeys,
    "diverged": DivergedKeys,
    "did_not_learn": DidNotLearnKeys,
    "claims[]": ClaimKeys,
    "futility_stop": FutilityStop,
    "decide": Decision,
}
"""Mappings of a study file by their place."""
