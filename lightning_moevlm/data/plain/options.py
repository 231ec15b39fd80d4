"""Options of tars without a manifest, in the words of the webdataset library."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number


@dataclass(frozen=True)
class WebDatasetOptions:
    """How the tars of `data.urls` are read.

    Args:
        image: Extensions of images, separated by ;, of which the first that a sample has counts. null: texts alone.
        caption: Extension of captions. null: images alone.
        caption_field: Field of the json member with the caption or a list of captions, in place of `caption`.
        decode: Decoding of images before `map`; null leaves them encoded, which is fastest.
        map: Function, or a class with `__call__`, from a sample as a dict to a dict; it may return None to leave the
            sample out.
        held_out: Tars of validation and test, named as in `data.urls`; null holds the last tar out.
        epoch_samples: Samples that count as an epoch; null takes the tars times the samples of the first.
    """

    image: str | None = "jpg;jpeg;png;webp"
    caption: str | None = "txt"
    caption_field: str | None = None
    decode: Literal["pil", "rgb8", "torchrgb8"] | None = None
    map: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None
    held_out: list[str] | str | None = None
    epoch_samples: int | None = None

    def __post_init__(self) -> None:
        """Check the members and ranges."""
        if self.epoch_samples is not None:
            check_number("data.webdataset.epoch_samples", self.epoch_samples, least=1)
        if not self.images and self.text is None:
            raise UserError("data.webdataset: image and caption are both null, so nothing is read; name one of them")

    @property
    def images(self) -> tuple[str, ...]:
        """Extensions of images, in lower case."""
        return tuple(name.strip(". ").lower() for name in (self.image or "").split(";") if name.strip(". "))

    @property
    def text(self) -> str | None:
        """Extension of the member with captions."""
        return "json" if self.caption_field is not None else self.caption

    def describe(self) -> str:
        """Return all of them as a text, the same in every process."""
        function = self.map if inspect.isroutine(self.map) else type(self.map)
        name = f"{function.__module__}.{function.__qualname__}"
        held = [] if self.map is None or function is self.map else sorted(vars(self.map).items())
        return f"{replace(self, map=None)} {name} {held}"

    def names_of(self, member: str) -> tuple[str, ...]:
        """Return the extensions in the tars of a member that a batch is made of; the first there counts."""
        if member == "image":
            return self.images
        return (self.caption,) if member == "txt" and self.caption is not None else (member,)
