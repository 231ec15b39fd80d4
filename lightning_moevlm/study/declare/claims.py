"""Reads the claims of a published result that a study tests, or refuses one that no run could decide.

A claim says which way a measure of one arm lies from that of another. So the rule of the study, not a reader's taste,
decides whether the result is reproduced: see `compare/claims.py`.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from lightning_moevlm.study.declare.decode import Positive, Record, decode, doc, kind
from lightning_moevlm.study.declare.value_types import read_metric
from lightning_moevlm.study.declare.yaml_nodes import YamlNode

Expected = Literal["lower", "higher", "same"]

LR_SENSITIVITY = "learning_rate_sensitivity"
"""A measure of an arm together with its twins at other learning rates; see `statistics/lr_sensitivity.py`."""


def _read_measure(node: YamlNode) -> str:
    return LR_SENSITIVITY if node.text() == LR_SENSITIVITY else read_metric(node)


Measure = Annotated[str, kind(f"metric, see `moevlm list metrics`, or {LR_SENSITIVITY}", _read_measure)]


class ClaimKeys(Record, frozen=True, kw_only=True):
    """One published result, as a difference that runs decide."""

    says: Annotated[str, doc("The claim in words, with the numbers of its source.", "The z-loss costs no quality.")]
    arm: Annotated[YamlNode, doc("The arm that the claim is about.", "router_z", "name of an arm")]
    against: Annotated[
        YamlNode | None, doc("The arm that it is compared with.", "baseline", "name of an arm", "the baseline")
    ] = None
    metric: Annotated[
        Measure | None, doc("What is compared, last value of a run.", "val/task_loss", default="the primary metric")
    ] = None
    against_metric: Annotated[
        Measure | None,
        doc("What it is compared with in the other arm.", "max_violation/block1/text", default="the same metric"),
    ] = None
    expect: Annotated[Expected, doc("Where the claim expects the arm's value.", "lower")]
    within: Annotated[
        Positive | None,
        doc("Largest difference that `expect: same` allows, in the metric's unit.", "0.05", default="none"),
    ] = None
    control: Annotated[
        bool,
        doc(
            "Not of the paper: a difference that must be seen, or `not seen` of the others says little.",
            "true",
            "true | false",
        ),
    ] = False


@dataclass(frozen=True)
class Claim:
    """One published result. The difference is `metric` of `arm` minus `against_metric` of `against`."""

    says: str
    arm: str
    against: str
    metric: str
    against_metric: str
    expect: Expected
    within: float | None = None  # of "same", in the metric's unit
    is_control: bool = False

    @property
    def name(self) -> str:
        """The comparison in few words."""
        if self.metric == self.against_metric:
            return f"{self.arm} against {self.against}"
        return f"{self.arm}: {self.metric} against {self.against_metric}" + (
            "" if self.arm == self.against else f" of {self.against}"
        )

    @property
    def expected(self) -> str:
        """The expectation in words."""
        return self.expect if self.within is None else f"{self.expect} within {self.within:g}"


def read_claims(node: YamlNode | None, arms: tuple[str, ...], baseline: str, primary: str) -> tuple[Claim, ...]:
    """Return the claims of a file.

    Args:
        node: Their place; None without any.
        arms: Names of all arms.
        baseline: The arm that is compared with unless a claim names another.
        primary: The metric that is compared unless a claim names another.

    Raises:
        UserError: A claim names an arm or a metric that there is none of, or compares a thing with itself.
    """
    return () if node is None or node.is_null else tuple(_read(one, arms, baseline, primary) for one in node.sequence())


def _read(node: YamlNode, names: tuple[str, ...], baseline: str, primary: str) -> Claim:
    keys = decode(node, ClaimKeys)
    arm = keys.arm.choice(names)
    against = baseline if keys.against is None or keys.against.is_null else keys.against.choice(names)
    metric = keys.metric or primary
    other = keys.against_metric or metric
    if (arm, metric) == (against, other):
        raise keys.arm.error(f"{metric} of {arm} is compared with itself; name another arm under `arm` or `against`")
    if (metric == LR_SENSITIVITY) != (other == LR_SENSITIVITY):
        raise node.error(f"{LR_SENSITIVITY} is compared with itself alone; remove `against_metric`")
    if (keys.expect == "same") != (keys.within is not None):
        raise node.error(
            "`expect: same` needs `within`, the largest difference that it allows"
            if keys.within is None
            else "`within` goes with `expect: same` alone; remove it"
        )
    return Claim(keys.says, arm, against, metric, other, keys.expect, keys.within, keys.control)
