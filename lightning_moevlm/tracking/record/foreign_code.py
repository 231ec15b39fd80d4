"""Identifies code outside this package that a configuration names, such as a router of one's own."""

import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_moevlm.tracking.record.provenance import CODE_TAG, digest_sources

_VERSIONED = ("lightning_moevlm", "lightning", "torch")  # a run records their versions or digest anyway
_SECTIONS = ("model", "data", "trainer")  # their texts may name code or files


def named_texts(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield every text of a configuration that may name code or a file."""
    for section in _SECTIONS:
        yield from _texts(config.get(section, {}))


def is_foreign_code(text: str) -> bool:
    """Whether a text names a class or function outside of this package, Lightning and torch."""
    words = text.split(".")
    is_path = len(words) > 1 and all(word.isidentifier() for word in words)
    return is_path and words[0] not in _VERSIONED and not Path(text).exists()


def foreign_packages(config: Mapping[str, Any]) -> set[str]:
    """Return the top-level modules or packages of the foreign code that a configuration names."""
    return {text.split(".")[0] for text in named_texts(config) if is_foreign_code(text)} - sys.stdlib_module_names


def foreign_digest(package: str) -> str | None:
    """Return a hash of the source of a top-level module or package as it lies on disk; None if it has none."""
    try:
        spec = find_spec(package)
    except ValueError:  # a module that was made at run time
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations is not None:
        return digest_sources([Path(folder) for folder in spec.submodule_search_locations])
    return digest_sources([Path(spec.origin)]) if spec.origin and spec.origin.endswith(".py") else None


def foreign_code_tags(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the tags of a run for the foreign code that its configuration names."""
    found = {package: foreign_digest(package) for package in sorted(foreign_packages(config))}
    return {foreign_code_tag(package): digest for package, digest in found.items() if digest is not None}


def foreign_code_tag(package: str) -> str:
    """Return the name of a package's tag."""
    return f"{CODE_TAG}/{package}"


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping | list):
        for below in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(below)
    elif isinstance(value, str):
        yield value
