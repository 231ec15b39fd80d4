"""Where a set's members lie in tars that were kept as they were found.

A set that this package has written needs none of it: every member has its own extension, and keys are unique.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """How members and keys of a set are found.

    stored_as: extensions in the tars, by the member that they are read as; a sample's first of them counts. Members
    that are not named here have the extension that is their name.
    caption_field: field of the json member that holds a caption or a list of captions; "" if they are the txt member.
    keys_repeat: keys are unique within a tar alone; samples are then called TAR/KEY.
    """

    stored_as: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    caption_field: str = ""
    keys_repeat: bool = False

    def extensions_of(self, member: str) -> tuple[str, ...]:
        """Return the extensions in the tars that a member may have, the first that a sample has counts."""
        return self.stored_as.get(member, (member,))

    def found(self, member: str, by_extension: Mapping[str, T]) -> T | None:
        """Return what a sample has for a member; None if it has nothing."""
        for extension in self.extensions_of(member):
            if extension in by_extension:
                return by_extension[extension]
        return None


PLAIN = Layout()
