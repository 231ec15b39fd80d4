"""Types of values that several keys of a study file take: a metric, a configuration file, a seed."""

from pathlib import Path
from typing import Annotated

from lightning_moevlm.common.nearest_name import suggest
from lightning_moevlm.common.shipped_files import describe_missing_file, find_file
from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.study.declare.decode import kind
from lightning_moevlm.study.declare.yaml_nodes import YamlNode

_SEEDS_END = 2**32  # what NumPy and Lightning take


def read_metric(node: YamlNode) -> str:
    """Return the key of a metric.

    Raises:
        UserError: It is not declared.
    """
    name = node.text()
    if metric_keys.find_metric(name) is None:
        # the usual values of the patterns are offered too, so that a slip in a real key finds the real key
        stages = [m.pattern.replace("{stage}", stage) for m in metric_keys.ALL for stage in ("val", "train")]
        hint = suggest(name, [*stages, *(m.pattern for m in metric_keys.ALL)])
        raise node.error(f"unknown metric {name!r}; {hint}`moevlm list metrics` shows every metric")
    return name


def _find_config(node: YamlNode) -> Path:
    """Find a base file: as given (from the working directory), beside the study file, or shipped with the package."""
    given = Path(node.text())
    beside = [node.file.parent]
    found = find_file(given, beside)
    if found is None:
        raise node.error(str(describe_missing_file("configuration file", given, beside)))
    return found


def _read_seed(node: YamlNode) -> int:
    seed = node.plain()
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise node.error(f"expected a whole number >= 0, got {node.describe()}")
    if seed >= _SEEDS_END:
        raise node.error(f"expected a seed below 2**32 = {_SEEDS_END}, got {seed}; take a small one such as 0")
    return seed


Metric = Annotated[str, kind("metric, see `moevlm list metrics`", read_metric)]
ConfigFile = Annotated[Path, kind("configuration file", _find_config)]
Seed = Annotated[int, kind("whole number from 0 to 2**32 - 1", _read_seed)]
