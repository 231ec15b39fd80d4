"""Finds texts beside images that no option reads, so that a set of images alone is made only on purpose."""

from collections.abc import Mapping
from itertools import islice

from lightning_moevlm.data.format.tar_members import Member
from lightning_moevlm.data.write.convert.sources.member_names import DEFAULT_CAPTION, MemberNames
from lightning_moevlm.data.write.convert.sources.row_source import RowError, parse_json_object

_LOOKED_AT = 100
"""Samples to search; the first one with a caption ends the search."""
_SHOWN = 4
"""Members, and fields, to offer."""
_LONGEST_TEXT = 10_000
"""Bytes; longer texts are not captions."""


class UnreadTexts:
    """Inspects the first samples of a folder of tars."""

    def __init__(self, names: MemberNames) -> None:
        self._names = names
        self._num_seen = 0
        self._accept_loss = names.text is None
        self._members: dict[str, None] = {}
        self._fields: dict[str, None] = {}

    @property
    def is_open(self) -> bool:
        """Whether it needs all members of the next sample."""
        return not self._accept_loss and self._num_seen < _LOOKED_AT

    def inspect(self, members: Mapping[str, Member]) -> None:
        """Inspect a sample."""
        self._accept_loss |= self._names.text in members
        if not self.is_open or members.keys().isdisjoint(self._names.images):
            return
        self._num_seen += 1
        for extension, member in members.items():
            if extension == "json":
                self._fields.update(dict.fromkeys(_text_fields(member.data or b"")))
            elif extension not in self._names.known and _is_text(member.data or b""):
                self._members[extension] = None

    @property
    def problem(self) -> str:
        """A message if no sample has a caption, but texts lie elsewhere or an option names them; otherwise ""."""
        text = self._names.text
        options = [f"--caption_member {name}" for name in islice(self._members, _SHOWN)]
        options += [f"--caption_field {name}" for name in islice(self._fields, _SHOWN)]
        if self._accept_loss or not self._num_seen or (not options and text == DEFAULT_CAPTION):
            return ""
        found = f", but texts in other places: give {' or '.join(options)}, or" if options else "; give"
        return f"samples have no .{text}{found} --caption_member null for a set of images alone"


def _text_fields(data: bytes) -> list[str]:
    """Return the fields of an annotation that hold sentences, or lists of them."""
    try:
        content = parse_json_object(data)
    except RowError:
        return []
    return [
        name for name, value in content.items() if any(map(_is_sentence, value if isinstance(value, list) else [value]))
    ]


def _is_sentence(value: object) -> bool:
    return isinstance(value, str) and len(value.split()) > 1 and not value.lstrip().startswith(("{", "[", "http"))


def _is_text(data: bytes) -> bool:
    if not 0 < len(data) <= _LONGEST_TEXT:
        return False
    try:
        return data.decode("utf-8").replace("\n", " ").replace("\r", " ").replace("\t", " ").isprintable()
    except UnicodeDecodeError:
        return False
