"""What one configuration file says of `data.sources` goes over what those before it say, source by source.

Everywhere else a later file changes the options that it names; in a mapping of names that the user chooses, the parser
(jsonargparse) would take the later file's alone, and an arm that sets one weight would silently lose the other sources.
What the parser cannot read from the command line, null, goes into files too.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml


def with_sources_merged(files: Sequence[Path], folder: Path) -> list[Path]:
    """Return the files, and after each that adds to the sources of those before it one that holds them all.

    Args:
        files: configuration files, in order.
        folder: where further files are written.
    """
    result: list[Path] = []
    known: dict[str, object] = {}
    for file in files:
        result.append(file)
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        data = content.get("data") if isinstance(content, Mapping) else None
        if not isinstance(data, Mapping) or "sources" not in data:
            continue
        sources = data["sources"]
        if not isinstance(sources, Mapping):
            known = {}  # null takes all of them away; what is neither is for the parser to refuse
            continue
        merged = _over(known, sources)
        if known:
            whole = folder / f"sources{len(result)}.yaml"
            whole.write_text(yaml.safe_dump({"data": {"sources": merged}}, sort_keys=False), encoding="utf-8")
            result.append(whole)
        known = merged
    return result


def _over(below: Mapping[str, object], above: Mapping[str, object]) -> dict[str, object]:
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        merged[name] = _over(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def with_nulls_as_files(words: Sequence[str], folder: Path) -> list[str]:
    """Put `--model...capacity null` into a file in its place.

    In a factory, jsonargparse reads 'None', and for a group it looks for a file of that name.
    """
    result: list[str] = []
    position = 0
    while position < len(words):
        key, equals, value = words[position].partition("=")
        if not equals and key.startswith("--") and position + 1 < len(words):
            value = words[position + 1]
        is_group = key.startswith("--model.") and key.count(".") == 1
        if value == "null" and (is_group or (key.startswith("--") and ".init_args." in key)):
            path = folder / f"null{position}.yaml"
            nested: object = None
            for part in reversed(key.removeprefix("--").split(".")):
                nested = {part: nested}
            path.write_text(json.dumps(nested), encoding="utf-8")
            result += ["-c", str(path)]
            position += 1 if equals else 2
        else:
            result.append(words[position])
            position += 1
    return result
