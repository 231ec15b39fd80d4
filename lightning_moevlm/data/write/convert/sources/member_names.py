"""Names the members of found tars that are images, captions and annotations."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.manifest import OTHER_SPELLINGS, Scalar
from lightning_moevlm.data.text.texts import parse_texts
from lightning_moevlm.data.write.convert.sources.row_source import RowError, clean_caption, parse_json_object

IMAGE_EXTENSIONS = ("jpg", "png", "webp")
DEFAULT_CAPTION = "txt"
T = TypeVar("T")
_SHOWN = 4
"""Extensions to show, of a sample without an image."""


@dataclass(frozen=True)
class MemberNames:
    """Extensions in the tars: the part of a file name after its first dot."""

    image: str | None = None  # of images; None for jpg, png or webp
    caption: str | None = DEFAULT_CAPTION  # of text members; None for a set of images
    caption_field: str | None = None  # field of the json member that holds captions instead

    def __post_init__(self) -> None:
        """Refuse invalid extensions."""
        for option, name in (("image_member", self.image), ("caption_member", self.caption)):
            if name is not None and (not name or name != name.strip(".").lower() or "/" in name):
                raise UserError(
                    f"--{option} is {name!r}; give the part of the file names after the first dot, in lower case, "
                    "such as input.jpg for KEY.input.jpg"
                )

    @property
    def images(self) -> tuple[str, ...]:
        """Extensions of images; the first that a sample has counts."""
        return IMAGE_EXTENSIONS if self.image is None else (OTHER_SPELLINGS.get(self.image, self.image),)

    @property
    def text(self) -> str | None:
        """Extension of the members with captions; None without captions."""
        return "json" if self.caption_field is not None else self.caption

    @property
    def known(self) -> frozenset[str]:
        """All extensions with a meaning."""
        return frozenset((*self.images, "json") if self.text is None else (*self.images, "json", self.text))

    def find_image(self, members: Mapping[str, T]) -> str:
        """Return the extension of a sample's image.

        Raises:
            RowError: if it has no image.
        """
        for extension in self.images:
            if extension in members:
                return extension
        found = ", ".join(f".{extension}" for extension in islice(members, _SHOWN))
        more = f" and {len(members) - _SHOWN} more" if len(members) > _SHOWN else ""
        remedy = _remedy([name for name in members if is_image(name)])
        raise RowError("member_missing", f"no image (.{', .'.join(self.images)}), only {found}{more}{remedy}")

    def read_captions(self, data: bytes) -> tuple[str, ...]:
        """Return the captions of a text member, at least one.

        Raises:
            RowError: if it has no captions, or is broken.
        """
        if self.caption_field is None:
            return (_decode_caption(data),)
        if self.caption_field not in (content := parse_json_object(data)):
            raise RowError("row_malformed", f"its json has no field {self.caption_field!r}, only {', '.join(content)}")
        return parse_captions(content[self.caption_field], self.caption_field)

    def as_arguments(self) -> dict[str, Scalar]:
        """Return values other than the defaults, as a part of the set's recipe."""
        named = {"image_member": self.image or "", "caption_field": self.caption_field or ""}
        arguments: dict[str, Scalar] = {option: name for option, name in named.items() if name}
        return arguments if self.caption == DEFAULT_CAPTION else {**arguments, "caption_member": self.caption or ""}


DEFAULT_NAMES = MemberNames()


def is_image(extension: str) -> bool:
    """Return whether an extension ends like those of images."""
    return extension.rpartition(".")[2] in (*IMAGE_EXTENSIONS, "jpeg", "gif", "bmp")


def _remedy(images: list[str]) -> str:
    if not images:
        return ""
    if len(images) == 1 and not images[0][0].isdigit():
        return f"; a key ends at the first dot of the name: try --image_member {images[0]}"
    return "; a key ends at the first dot of the name: rename the files, so that no key has a dot in it"


def parse_captions(value: object, field: str) -> tuple[str, ...]:
    """Return the captions of a JSON field, at least one.

    Raises:
        RowError: if it has no captions.
    """
    try:
        captions = parse_texts(value, field)
    except UnicodeError:
        raise RowError("text_not_utf8", f"field {field!r} holds escapes that are not UTF-8") from None
    except ValueError as error:
        raise RowError("row_malformed", str(error)) from None
    if not captions:
        raise RowError("caption_empty", f"field {field!r} holds no caption")
    return captions


def _decode_caption(data: bytes) -> str:
    try:
        return clean_caption(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError("text_not_utf8", f"invalid UTF-8 at byte {error.start + 1}") from None
