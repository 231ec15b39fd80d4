"""Resolves a run's base, its first configuration file alone, so that the changes of the others can be shown.

That takes as long as to resolve the run itself, so the base is kept for the forks of a process that has done it.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from jsonargparse import ArgumentError, Namespace
from lightning.pytorch.cli import LightningArgumentParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_moevlm.common.secret_masking import mask_secrets
from lightning_moevlm.common.yaml_text import read_yaml


@dataclass(frozen=True)
class _Alone:
    """A file by its text and that of the files it names, so that a changed one is read again.

    All parsers of a subcommand are alike.
    """

    source: Path
    text: bytes
    named: tuple[bytes, ...]
    subcommand: str
    parser: LightningArgumentParser = field(compare=False, repr=False)


def resolve_base(parser: LightningArgumentParser, sources: Sequence[Path]) -> tuple[dict[str, object], str]:
    """Return the base of a command line's configuration files, secrets masked, and a description of it."""
    if not sources:
        return _defaults(parser), "against the defaults: no configuration file was given"
    source = sources[0].absolute()
    text = source.read_bytes()
    named = tuple(file.read_bytes() for file in _named_files(read_yaml(text.decode()), source.parent))
    return _resolved_alone(_Alone(source, text, named, parser.prog, parser))


def to_masked_tree(
    parser: LightningArgumentParser, config: Namespace, *, keep_references: bool = False
) -> dict[str, object]:
    """Return a parsed configuration as plain values, every default filled in and secrets masked.

    Args:
        parser: of the subcommand.
        config: its result.
        keep_references: keep `${trainer.max_steps}` instead of the number.
    """
    dumped = parser.dump(config, skip_unset=False, skip_link_targets=False, skip_validation=True)
    tree = read_yaml(dumped) or {}
    tree.pop("config", None)  # the files' names; their content is recorded
    if not keep_references and "${" in dumped:
        tree = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    clean = mask_secrets(tree, os.environ)
    assert isinstance(clean, dict)
    return clean


@cache
def _resolved_alone(alone: _Alone) -> tuple[dict[str, object], str]:
    parser = alone.parser
    exits, parser.exit_on_error = parser.exit_on_error, False
    try:
        base = parser.parse_args(["--config", str(alone.source)])
    except (ArgumentError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        return _defaults(parser), f"against the defaults: {alone.source.name} is not complete alone ({reason})"
    finally:
        parser.exit_on_error = exits
    return to_masked_tree(parser, base), f"against {alone.source.name} alone"


def _defaults(parser: LightningArgumentParser) -> dict[str, object]:
    return to_masked_tree(parser, parser.get_defaults(skip_validation=True))


def _named_files(node: object, folder: Path) -> list[Path]:
    """Return the YAML files that stand for a part of a configuration, as in `callbacks: mine.yaml`."""
    if isinstance(node, dict | list):
        children = node.values() if isinstance(node, dict) else node
        return [file for child in children for file in _named_files(child, folder)]
    named = isinstance(node, str) and node.endswith((".yaml", ".yml"))
    return [file for file in (folder / str(node), Path(str(node))) if file.is_file()] if named else []
