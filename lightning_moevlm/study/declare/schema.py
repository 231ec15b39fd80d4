"""Keys of a study file as data: what each takes, what it means and what it is where it is left out.

The reader and the documentation (`moevlm describe study`, `moevlm sweep new`) use the same keys, so that neither says
what the other does not.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lightning_moevlm.study.declare.yaml_nodes import YamlNode

Read = TypeVar("Read", covariant=True)


@dataclass(frozen=True)
class Value(Generic[Read]):
    """A kind of value. text: what is allowed, for people; read: takes it from its node, or refuses it."""

    text: str
    read: Callable[[YamlNode], Read]


@dataclass(frozen=True)
class Key(Generic[Read]):
    """One key of a mapping.

    meaning: one sentence, with the unit.
    example: YAML, as it stands after the colon.
    default: where the key is left out; null in the file stands for a default of None.
    default_words: the default for people, where it follows from something else.
    """

    name: str
    value: Value[Read]
    meaning: str
    example: str
    default: Read | None = None
    default_words: str = ""
    is_required: bool = False

    def of(self, fields: Mapping[str, YamlNode]) -> Read:
        """Return the value that a mapping has for this key, or the default.

        Raises:
            UserError: the value is not allowed.
        """
        node = fields.get(self.name)
        if node is None or (node.is_null and self.default is None and not self.is_required):
            return self.default  # type: ignore[return-value]  # Read includes None where that is the default
        return self.value.read(node)

    @property
    def default_text(self) -> str:
        """The default in words; "required" where there is none."""
        if self.is_required:
            return "required"
        if self.default_words:
            return self.default_words
        return "none" if self.default in (None, "", ()) else f"{self.default}"


@dataclass(frozen=True)
class Block:
    """One mapping of a study file. path: where it stands, "" for the file itself; about: one sentence."""

    path: str
    about: str
    keys: tuple[Key[Any], ...]

    def fields(self, node: YamlNode) -> dict[str, YamlNode]:
        """Return the children of a mapping of this kind.

        Raises:
            UserError: a key is unknown, or a required one is missing.
        """
        return node.fields(self.requires, tuple(key.name for key in self.keys if not key.is_required))

    @property
    def requires(self) -> tuple[str, ...]:
        """Names of the keys that may not be left out."""
        return tuple(key.name for key in self.keys if key.is_required)


TEXT = Value("text", YamlNode.text)
AMOUNT = Value("number >= 0", YamlNode.amount)


def node_of(words: str) -> Value[YamlNode]:
    """Return a value that is a mapping or a list with a reader of its own."""
    return Value(words, lambda node: node)


def whole(least: int) -> Value[int]:
    """Return whole numbers that are at least so large."""
    return Value(f"whole number >= {least}", lambda node: node.integer(least))


def number(above: float, below: float = float("inf")) -> Value[float]:
    """Return finite numbers strictly between the bounds."""
    words = f"number > {above:g}" if below == float("inf") else f"number between {above:g} and {below:g}"
    return Value(words, lambda node: node.number(above, below))


def one_of(words: tuple[str, ...]) -> Value[Any]:
    """Return one of some words."""
    return Value(" | ".join(words), lambda node: node.choice(words))


def list_of(value: Value[Any]) -> Value[tuple[Any, ...]]:
    """Return lists with at least one entry of a kind."""
    return Value(f"list, each a {value.text}", lambda node: tuple(value.read(child) for child in node.sequence()))
