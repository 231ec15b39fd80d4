"""Prepares hyperparameters as MLflow's params: text, flat, immutable, at most 6,000 characters."""

import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, NamedTuple

from lightning_moevlm.common.flat_config import flatten
from lightning_moevlm.common.secret_masking import mask_secrets
from lightning_moevlm.tracking.write.metric_names import safe_name

CHANGED_TAG = "changed_param/"
"""Prefix of the tags of params that a resume changed; MLflow's params stay as they were first."""
LONGEST_VALUE = 6000  # characters; MLflow cuts beyond. Lightning's logger cuts at 250.


class SortedParams(NamedTuple):
    """Params, flat and masked."""

    new: dict[str, str]
    """Not in the run yet."""
    changed: dict[str, str]
    """In the run with another value."""
    too_long: dict[str, str]
    """Whole values of those that are cut."""


def sort_params(params: Mapping[str, Any] | Namespace, existing: Mapping[str, str]) -> SortedParams:
    """Compare params (nested mappings, lists, namespaces and dataclasses) with the run's, as MLflow returns them."""
    whole = {safe_name(key): value for key, value in flatten(_masked_tree(params)).items()}
    cut = {key: value[:LONGEST_VALUE] for key, value in whole.items()}
    return SortedParams(
        new={key: value for key, value in cut.items() if key not in existing},
        changed={key: value for key, value in cut.items() if existing.get(key, value) != value},
        too_long={key: value for key, value in whole.items() if len(value) > LONGEST_VALUE},
    )


def _masked_tree(params: Mapping[str, Any] | Namespace) -> dict[str, object]:
    tree = mask_secrets(_plain(params), os.environ)
    assert isinstance(tree, dict)
    return tree


def _plain(value: object) -> object:
    """Return mappings, lists and scalars only; dataclasses and namespaces become mappings."""
    if isinstance(value, Namespace):
        value = vars(value)
    elif is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value
