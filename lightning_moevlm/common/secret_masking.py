"""Replaces secrets by ***, so that no run records one.

A text is a secret if its key says so (`api_key`, `hf_token`, `password` ...), if an environment variable with such a
name holds it (`${oc.env:...}` is recorded resolved), or if it stands before the @ or in the query of a URL.
`mask_token: "[MASK]"` and other vocabulary is not a secret.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

from lightning_moevlm.common.yaml_text import read_yaml, write_yaml

_ALWAYS = {"password", "passwd", "passphrase", "secret", "secrets", "credential", "credentials", "apikey"}
_KEY_KINDS = {"api", "access", "private", "secret", "auth", "encryption", "signing"}
_VOCABULARY = {"mask", "pad", "cls", "class", "sep", "bos", "eos", "unk", "begin", "start", "end", "stop"}
_VOCABULARY |= {"special", "patch"}
MASK = "***"
_SHORTEST_SECRET = 8  # characters; shorter values of environment variables occur in texts by chance
_CREDENTIALS = re.compile(r"(?<=://)[^/\s'\"]+(?=@)")
_QUERY = re.compile(r"(://[^\s?#'\"<>]*\?)[^\s#'\"<>)\]]+")


def is_secret_key(key: str) -> bool:
    """Return whether the last part of a dotted key names a secret."""
    words = re.split(r"[_\-]", re.split(r"[./]", key)[-1].lower())
    if _ALWAYS & set(words):
        return True
    pairs = pairwise(words)
    if any(kind in _KEY_KINDS and noun in ("key", "keys") for kind, noun in pairs):
        return True
    return words[-1] == "token" and not (len(words) > 1 and words[-2] in _VOCABULARY)


def mask_secrets(value: object, environment: Mapping[str, str], key: str = "") -> object:
    """Return a copy of a tree of dicts, lists and scalars with every secret replaced; interpolations stay."""
    if isinstance(value, Mapping):
        return {name: mask_secrets(inner, environment, str(name)) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [mask_secrets(inner, environment, key) for inner in value]
    if not isinstance(value, str) or not value:
        return value
    if is_secret_key(key) and not value.startswith("${"):
        return MASK
    return _without_known_secrets(value, environment)


def mask_yaml(text: str, environment: Mapping[str, str]) -> str:
    """Return a YAML text as it is or, if it holds a secret, its masked content without comments."""
    tree = read_yaml(text)
    clean = mask_secrets(tree, environment)
    if clean == tree:
        return text
    return "# a secret was masked here; comments are lost\n" + write_yaml(clean)


def mask_argv(argv: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Return a command line with the values of secret options replaced (`--api_key V` and `--api_key=V`)."""
    clean: list[str] = []
    follows_secret = False
    for word in argv:
        name, equals, _ = word.partition("=")
        secret = word.startswith("-") and is_secret_key(name.lstrip("-"))
        if follows_secret and not word.startswith("--"):
            clean.append(MASK)
        elif secret and equals:
            clean.append(f"{name}={MASK}")
        else:
            clean.append(_without_known_secrets(word, environment))
        follows_secret = secret and not equals
    return clean


def _without_known_secrets(text: str, environment: Mapping[str, str]) -> str:
    for name, value in environment.items():
        if len(value) >= _SHORTEST_SECRET and value in text and is_secret_key(name):
            text = text.replace(value, MASK)
    return mask_url_secrets(text)


def mask_url_secrets(text: str) -> str:
    """Return a text with the credentials (`//user:password@`) and queries (`?...`) of the URLs in it replaced."""
    return _QUERY.sub(rf"\1{MASK}", _CREDENTIALS.sub(MASK, text))
