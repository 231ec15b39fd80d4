"""Resolves a run's base, its first configuration file alone, so that the changes of the others can be shown.

That takes as long as to resolve the run itself, so the base is kept for the forks of a process that has done it.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

from jsonargparse import ArgumentError, Namespace
from lightning.pytorch.cli import LightningArgumentParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_moevlm.common.secret_masking import mask_secrets
from lightning_moevlm.common.yaml_text import read_yaml


class Trees(NamedTuple):
    """A parsed configuration as plain values, every default filled in and secrets masked."""

    written: dict[str, object]  # with references such as `${trainer.max_steps}`
    resolved: dict[str, object]


@dataclass(frozen=True)
class _Alone:
    """A file by its name, its text and that of the files it names, so that a changed one is read again.

    All parsers of a subcommand are alike.
    """

    name: str
    text: bytes
    named: tuple[bytes, ...]
    subcommand: str
    source: Path = field(compare=False)
    parser: LightningArgumentParser = field(compare=False, repr=False)


def resolve_base(parser: LightningArgumentParser, sources: Sequence[Path]) -> tuple[dict[str, object], str]:
    """Return the base of a command line's configuration files, secrets masked, and a description of it."""
    if not sources:
        return _defaults(parser), "against the defaults: no configuration file was given"
    source = sources[0].absolute()
    text = source.read_bytes()
    named = tuple(file.read_bytes() for file in _named_files(read_yaml(text.decode()), source.parent))
    return _resolved_alone(_Alone(source.name, text, named, parser.prog, source, parser))


def to_masked_trees(parser: LightningArgumentParser, config: Namespace) -> Trees:
    """Return what a parser has parsed, with its references and with their values.

    Args:
        parser: of the subcommand.
        config: its result.
    """
    dumped = parser.dump(config, skip_unset=False, skip_link_targets=False, skip_validation=True)
    written = read_yaml(dumped) or {}
    written.pop("config", None)  # the files' names; their content is recorded
    resolved = OmegaConf.to_container(OmegaConf.create(written), resolve=True) if "${" in dumped else written
    return Trees(*(dict(mask_secrets(tree, os.environ)) for tree in (written, resolved)))  # type: ignore[call-overload]


@cache
def _resolved_alone(alone: _Alone) -> tuple[dict[str, object], str]:
    parser = alone.parser
    exits, parser.exit_on_error = parser.exit_on_error, False
    try:
        base = parser.parse_args(["--config", str(alone.source)])
    except (ArgumentError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        return _defaults(parser), f"against the defaults: {alone.name} is not complete alone ({reason})"
    finally:
        parser.exit_on_error = exits
    return to_masked_trees(parser, base).resolved, f"against {alone.name} alone"


def _defaults(parser: LightningArgumentParser) -> dict[str, object]:
    return to_masked_trees(parser, parser.get_defaults(skip_validation=True)).resolved


def _named_files(node: object, folder: Path) -> list[Path]:
    """Return the YAML files that stand for a part of a configuration, as in `callbacks: mine.yaml`."""
    if isinstance(node, dict | list):
        children = node.values() if isinstance(node, dict) else node
        return [file for child in children for file in _named_files(child, folder)]
    named = isinstance(node, str) and node.endswith((".yaml", ".yml"))
    return [file for file in (folder / str(node), Path(str(node))) if file.is_file()] if named else []
