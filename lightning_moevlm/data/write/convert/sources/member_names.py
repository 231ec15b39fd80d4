"""Which members of somebody else's tars are images, captions and annotations."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.manifest import OTHER_SPELLINGS, Scalar
from lightning_moevlm.data.text.json_texts import parse_texts
from lightning_moevlm.data.write.convert.sources.row_source import RowError, clean_caption, parse_json_object

IMAGE_EXTENSIONS = ("jpg", "png", "webp")
DEFAULT_CAPTION = "txt"
T = TypeVar("T")
_SHOWN = 4
"""Extensions, of a sample that lacks an image."""


@dataclass(frozen=True)
class MemberNames:
    """Extensions in the tars: what follows the first dot of a file name.

    image: of the images; None for jpg, png or webp. caption: of the text members; None for a set of images alone.
    caption_field: field of the json member that captions are read from instead, a text or a list of texts.
    """

    image: str | None = None
    caption: str | None = DEFAULT_CAPTION
    caption_field: str | None = None

    def __post_init__(self) -> None:
        """Refuse extensions that no member can have."""
        for option, name in (("image_member", self.image), ("caption_member", self.caption)):
            if name is not None and (not name or name != name.strip(".").lower() or "/" in name):
                raise UserError(
                    f"--{option} is {name!r}; give what follows the first dot of the file names, in lower case, as "
                    "input.jpg for KEY.input.jpg"
                )

    @property
    def images(self) -> tuple[str, ...]:
        """Extensions of images, the first that a sample has counts."""
        return IMAGE_EXTENSIONS if self.image is None else (OTHER_SPELLINGS.get(self.image, self.image),)

    @property
    def text(self) -> str | None:
        """Extension of the members that captions are read from; None if there are none."""
        return "json" if self.caption_field is not None else self.caption

    @property
    def known(self) -> frozenset[str]:
        """All extensions that mean something."""
        return frozenset((*self.images, "json") if self.text is None else (*self.images, "json", self.text))

    def find_image(self, members: Mapping[str, T]) -> str:
        """Return the extension of a sample's image.

        Raises:
            RowError: if it has none.

        """
        for extension in self.images:
            if extension in members:
                return extension
        found = ", ".join(f".{extension}" for extension in islice(members, _SHOWN))
        more = f" and {len(members) - _SHOWN} more" if len(members) > _SHOWN else ""
        remedy = _remedy([name for name in members if is_image(name)])
        raise RowError("member_missing", f"no image (.{', .'.join(self.images)}), only {found}{more}{remedy}")

    def read_captions(self, data: bytes) -> tuple[str, ...]:
        """Return the captions that a text member holds, at least one.

        Raises:
            RowError: if there are none, or the member is broken.

        """
        if self.caption_field is None:
            return (_decode_caption(data),)
        if self.caption_field not in (content := parse_json_object(data)):
            raise RowError("row_malformed", f"its json has no field {self.caption_field!r}, only {', '.join(content)}")
        return parse_captions(content[self.caption_field], self.caption_field)

    def as_arguments(self) -> dict[str, Scalar]:
        """Return what is not as usual, as a part of the set's recipe."""
        named = {"image_member": self.image or "", "caption_field": self.caption_field or ""}
        arguments: dict[str, Scalar] = {option: name for option, name in named.items() if name}
        return arguments if self.caption == DEFAULT_CAPTION else {**arguments, "caption_member": self.caption or ""}


DEFAULT_NAMES = MemberNames()


def is_image(extension: str) -> bool:
    """Tell whether an extension ends as those of images do."""
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
        RowError: if there are none.

    """
    try:
        captions = parse_texts(value, field)
    except UnicodeError:
        raise RowError("text_not_utf8", f"field {field!r} holds escapes that are no UTF-8") from None
    except ValueError as error:
        raise RowError("row_malformed", str(error)) from None
    if not captions:
        raise RowError("caption_empty", f"field {field!r} holds no caption")
    return captions


def _decode_caption(data: bytes) -> str:
    try:
        return clean_caption(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError("text_not_utf8", f"bytes that are no UTF-8 at byte {error.start + 1}") from None
