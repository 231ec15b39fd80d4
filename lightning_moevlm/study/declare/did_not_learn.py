"""Reads the rule by which a run did not learn, or refuses one by which no run could be judged."""

from collections.abc import Mapping
from pathlib import Path

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.study.declare.comparison import Arm, DidNotLearn, Direction, Primary
from lightning_moevlm.study.declare.decode import decode
from lightning_moevlm.study.declare.study_keys import DidNotLearnKeys
from lightning_moevlm.study.declare.yaml_nodes import YamlNode, compose_text

_RULES = ("share_of_healthy", "no_better_than", "stalled_steps")


def read_did_not_learn(
    keys: DidNotLearnKeys, node: YamlNode, primary: Primary, baseline: str, arms: tuple[Arm, ...], last: int | None
) -> DidNotLearn:
    """Return the rule.

    Args:
        keys: As the file gives them.
        node: Their place.
        primary: The metric that is judged unless the keys name another.
        baseline: The healthy arm unless the keys name another.
        arms: All arms.
        last: Number of optimiser steps of a run, if it is fixed.

    Raises:
        UserError: The keys hold no rule, or one that cannot judge a run.
    """
    if all(getattr(keys, name) is None for name in _RULES):
        raise node.error(f"no rule is set; set at least one of {', '.join(_RULES)}")
    healthy = None if keys.healthy is None or keys.healthy.is_null else keys.healthy
    if healthy is not None and keys.share_of_healthy is None:
        raise healthy.error("the healthy arm is the measure of share_of_healthy alone; set that, or remove it")
    metric = keys.metric or primary.metric
    if keys.no_better_than is not None:
        _refuse_other_unit(metric, keys.no_better_than, node.child("no_better_than"))
    if keys.stalled_steps is not None and last is not None and keys.stalled_steps >= last:
        raise node.child("stalled_steps").error(
            f"a run of {last} steps has no value before its last {keys.stalled_steps} steps; give fewer"
        )
    return DidNotLearn(
        metric,
        primary.direction if metric == primary.metric else _direction(metric, node),
        baseline if healthy is None else healthy.choice(tuple(arm.name for arm in arms)),
        keys.share_of_healthy,
        keys.no_better_than,
        keys.stalled_steps,
    )


def read_words(
    words: Mapping[str, str], option: str, primary: Primary, baseline: str, arms: tuple[Arm, ...]
) -> DidNotLearn:
    """Return the rule from its keys and values as texts. option: that gave them, for errors; the rest as above.

    Raises:
        UserError: As above, or an unknown key.
    """
    node = compose_text("".join(f"{key}: {value}\n" for key, value in words.items()), Path(option))
    assert node is not None, "one word at least"
    return read_did_not_learn(decode(node, DidNotLearnKeys), node, primary, baseline, arms, None)


def _direction(metric: str, node: YamlNode) -> Direction:
    declared = metric_keys.find_metric(metric)
    if declared is None or declared.better == "neither":
        raise node.child("metric").error(
            f"it is not declared whether lower or higher {metric} is better; take another metric, such as val/task_loss"
        )
    return declared.better


def _refuse_other_unit(metric: str, constant: str, node: YamlNode) -> None:
    units = [metric_keys.name_and_unit(key)[1] or "pure number" for key in (metric, constant)]
    if metric == constant:
        raise node.error(f"{metric} is compared with itself; name the metric of a constant answer")
    if units[0] != units[1]:
        raise node.error(
            f"{constant} ({units[1]}) cannot be compared with {metric} ({units[0]}); set `metric` to what it is the "
            "constant answer of, such as val/accuracy_text for val/majority_text"
        )
