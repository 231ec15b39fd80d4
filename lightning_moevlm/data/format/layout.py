"""Locates members in tars that a set uses unchanged.

A set that this package has written does not need it: its members have their own extensions, and its keys are unique.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """Names of members and keys in a set's tars.

    Attributes:
        stored_as: Extensions in the tars by member; the first that a sample has counts. Other members have their own
            name as extension.
        caption_field: Field of the json member that holds a caption or a list of them; "" for the txt member.
        keys_repeat: Whether keys are unique within a tar only. Samples are then named TAR/KEY.
    """

    stored_as: Mapping[str, tuple[str, ...]]
    caption_field: str
    keys_repeat: bool

    def extensions_of(self, member: str) -> tuple[str, ...]:
        """Return the extensions of a member in the tars; the first that a sample has counts."""
        return self.stored_as.get(member, (member,))

    def find(self, member: str, by_extension: Mapping[str, T]) -> T | None:
        """Return a sample's value for a member; None if it has none."""
        for extension in self.extensions_of(member):
            if extension in by_extension:
                return by_extension[extension]
        return None


PLAIN_LAYOUT = Layout({}, "", keys_repeat=False)
