"""One batch of image-text pairs, the input of every model, and conversations that another model's processor made."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_moevlm.contracts.routing_plan import Modality

PADDING = 0
"""The id after the end of a shorter sequence; no model looks at it."""


class Chat(NamedTuple):
    """One conversation.

    ids_S: int64 token ids of the model; each image is a row of placeholders.
    modality_S: int64, `Modality` values.
    answer_S: bool, True on tokens of answers, the end of each answer included.
    images: arguments of the model's forward pass, by name; those of several samples are joined at their first axis.
    """

    ids_S: Tensor
    modality_S: Tensor
    answer_S: Tensor
    images: Mapping[str, Tensor]

    def prompt(self) -> "Chat":
        """Return what stands before the first answer."""
        is_before_S = self.answer_S.cumsum(0) == 0
        return Chat(self.ids_S[is_before_S], self.modality_S[is_before_S], self.answer_S[is_before_S], self.images)

    def reply(self, ids: Sequence[int]) -> "Chat":
        """Return the conversation with tokens of an answer after it."""
        added_N = torch.tensor(ids, dtype=torch.int64, device=self.ids_S.device)
        return Chat(
            torch.cat([self.ids_S, added_N]),
            torch.cat([self.modality_S, torch.full_like(added_N, int(Modality.TEXT))]),
            torch.cat([self.answer_S, torch.ones_like(added_N, dtype=torch.bool)]),
            self.images,
        )

    def without_images(self) -> "Chat":
        """Return the conversation without what was made of images; their placeholders stay."""
        return self._replace(images={})


class JoinedChats(NamedTuple):
    """Conversations of a batch, padded at their ends.

    ids_BS, modality_BS, answer_BS: as in `Chat`.
    valid_BS: bool, False on padding.
    images: as in `Chat`, of all conversations.
    """

    ids_BS: Tensor
    modality_BS: Tensor
    answer_BS: Tensor
    valid_BS: Tensor
    images: dict[str, Tensor]

    @property
    def length_B(self) -> Tensor:
        """Tokens of each conversation, int64."""
        return self.valid_BS.sum(dim=1)


class Answers(NamedTuple):
    """What the questions of a batch are answered by, one entry per sample."""

    given: tuple[tuple[str, ...], ...]  # all answers of a question, repeated where several people gave the same
    kinds: tuple[str, ...]  # kinds of question, such as count; scores are reported by kind

    def select(self, rows: Iterable[int]) -> "Answers":
        """Return those of some samples."""
        chosen = list(rows)
        return Answers(tuple(self.given[row] for row in chosen), tuple(self.kinds[row] for row in chosen))


class FurtherCaptions(NamedTuple):
    """Captions of a batch's images beside the one that each pair has, M in all.

    text_ML: like text_BL.
    text_mask_ML: like text_mask_BL.
    pairs: for each, the number of its pair.
    """

    text_ML: Tensor
    text_mask_ML: Tensor
    pairs: tuple[int, ...]

    def select(self, rows: Sequence[int]) -> "FurtherCaptions | None":
        """Return those of some samples, which are numbered anew; None without any."""
        own: dict[int, list[int]] = {}
        for place, pair in enumerate(self.pairs):
            own.setdefault(pair, []).append(place)
        chosen = [(number, place) for number, row in enumerate(rows) for place in own.get(row, ())]
        if not chosen:
            return None
        pairs, places = zip(*chosen, strict=True)
        return FurtherCaptions(self.text_ML[list(places)], self.text_mask_ML[list(places)], pairs)

    def names(self, keys: Sequence[str]) -> tuple[str, ...]:
        """Return a name of each, by the keys of the samples: KEY#1 is the first of its sample."""
        before = Counter[int]()
        names = []
        for pair in self.pairs:
            before[pair] += 1
            names.append(f"{keys[pair]}#{before[pair]}")
        return tuple(names)


class Batch(NamedTuple):
    """A collated batch; a modality that is absent from all samples is None.

    Samples are ordered: pairs, then images alone, then texts alone. Images are those of pairs and of images alone,
    texts those of pairs and of texts alone. Each has its own B.

    images_BRYX: uint8, RGB.
    text_BL: int64 token ids, padded.
    text_mask_BL: bool, True on real tokens.
    keys: the samples' WebDataset keys, in order.
    num_pairs: how many leading images and texts belong together; None if every image has its text.
    sources: name of each sample's source (`data.sources`), in order; empty if no loader made the batch.
    num_cut: texts read for the batch that were cut at the end, by source of the loader.
    step: the batches of the whole optimiser step; None if the loader does not look ahead.
    answers: of the texts, which then are questions or statements; None if they are not read.
    second_images_BRYX: like images_BRYX, the other image of samples with two, black where a sample has one; None if not
        read.
    further_captions: of the images of pairs, for the metrics of an evaluation; None in training, and if no sample has
        several captions.
    chats: of the texts, one each, for a model with a processor of its own (`data.chat`); None without one. Images and
        texts above are then for metrics alone.
    """

    images_BRYX: Tensor | None
    text_BL: Tensor | None
    text_mask_BL: Tensor | None
    keys: tuple[str, ...]
    num_pairs: int | None = None
    sources: tuple[str, ...] = ()
    num_cut: tuple[int, ...] = ()
    step: "WholeStep | None" = None
    answers: Answers | None = None
    second_images_BRYX: Tensor | None = None
    further_captions: FurtherCaptions | None = None
    chats: tuple[Chat, ...] | None = None

    @property
    def num_samples(self) -> int:
        """Number of samples of any kind."""
        return len(self.keys)

    @property
    def pairs(self) -> int:
        """Number of samples with both an image and a text."""
        if self.images_BRYX is None or self.text_BL is None:
            return 0
        return len(self.keys) if self.num_pairs is None else self.num_pairs

    @property
    def device(self) -> torch.device:
        """Device of the values; images without pixels do not count."""
        held = [each for each in (self.text_BL, self.images_BRYX) if each is not None and not each.is_meta]
        return held[0].device if held else torch.device("cpu")

    @property
    def image_keys(self) -> tuple[str, ...]:
        """Key of the sample of each image."""
        return () if self.images_BRYX is None else self.keys[: len(self.images_BRYX)]

    @property
    def text_keys(self) -> tuple[str, ...]:
        """Key of the sample of each text."""
        return self._of_texts(self.keys)

    @property
    def text_sources(self) -> tuple[str, ...]:
        """Name of the source of each text; empty if no loader made the batch."""
        return self._of_texts(self.sources)

    def _of_texts(self, of_samples: tuple[str, ...]) -> tuple[str, ...]:
        return () if self.text_BL is None else of_samples[: self.pairs] + of_samples[len(self.image_keys) :]

    def first(self, num_samples: int) -> "Batch":
        """Return the first samples."""
        num_samples = min(num_samples, self.num_samples)
        pairs = min(num_samples, self.pairs)
        num_images = min(num_samples, len(self.image_keys))
        images, texts = slice(num_images), slice(num_samples - num_images + pairs)
        return Batch(
            _take(self.images_BRYX, images),
            _take(self.text_BL, texts),
            _take(self.text_mask_BL, texts),
            self.keys[:num_samples],
            pairs,
            self.sources[:num_samples],
            answers=None if self.answers is None else self.answers.select(range(num_samples)),
            second_images_BRYX=_take(self.second_images_BRYX, images),
            further_captions=None if self.further_captions is None else self.further_captions.select(range(pairs)),
            chats=None if self.chats is None else self.chats[texts],
        )

    def select(self, rows: Sequence[int]) -> "Batch":
        """Return some samples. rows: their numbers, those of pairs first, then of images alone, then of texts alone."""
        pairs, num_images = self.pairs, len(self.image_keys)
        images = [row for row in rows if row < num_images]
        texts = [row if row < pairs else row - num_images + pairs for row in rows if not pairs <= row < num_images]
        return Batch(
            _take(self.images_BRYX, images),
            _take(self.text_BL, texts),
            _take(self.text_mask_BL, texts),
            tuple(self.keys[row] for row in rows),
            sum(row < pairs for row in rows),
            tuple(self.sources[row] for row in rows) if self.sources else (),
            answers=None if self.answers is None else self.answers.select(rows),
            second_images_BRYX=_take(self.second_images_BRYX, images),
            further_captions=None if self.further_captions is None else self.further_captions.select(rows),
            chats=None if self.chats is None else tuple(self.chats[row] for row in texts),
        )

    def each_caption(self) -> "Batch":
        """Return the batch with each further caption as a pair of its own, with a copy of its image, after the others.

        Of a batch that holds pairs alone. Conversations are about first captions; with them the batch stays as it is.
        """
        further = self.further_captions
        if further is None or self.chats is not None:
            return self
        assert self.text_BL is not None and self.text_mask_BL is not None and self.pairs == self.num_samples
        repeated = self._replace(further_captions=None).select([*range(self.pairs), *further.pairs])
        return repeated._replace(
            text_BL=torch.cat([self.text_BL, further.text_ML]),
            text_mask_BL=torch.cat([self.text_mask_BL, further.text_mask_ML]),
            keys=(*self.keys, *further.names(self.keys)),
        )

    def of_sources(self, names: Collection[str]) -> "Batch":
        """Return the samples of some sources."""
        return self.select([row for row, name in enumerate(self.sources) if name in names])

    def without_pixels(self) -> "Batch":
        """Return the batch with images on "meta": a shape without values."""
        first, second = (
            None if images is None else images.to("meta") for images in (self.images_BRYX, self.second_images_BRYX)
        )
        chats = None if self.chats is None else tuple(chat.without_images() for chat in self.chats)
        return self._replace(images_BRYX=first, second_images_BRYX=second, chats=chats, step=None)


def _take(tensor_BX: Tensor | None, rows: slice | list[int]) -> Tensor | None:
    """Return some rows; None instead of no row."""
    taken_BX = None if tensor_BX is None else tensor_BX[rows]
    return taken_BX if taken_BX is not None and len(taken_BX) else None


class WholeStep:
    """The batches of one optimiser step on this rank, without pixels.

    Neither a tuple nor a dataclass, so that moving the batch to a device does not move it too.
    """

    __slots__ = ("batches",)

    def __init__(self, batches: tuple[Batch, ...]) -> None:
        self.batches = batches


def join_chats(chats: Sequence[Chat]) -> JoinedChats:
    """Pad conversations to the longest, and join their images.

    Images of other shapes are padded with zeros behind their first axis, as processors pad a batch.
    """
    pad = torch.nn.utils.rnn.pad_sequence
    ids_BS = pad([chat.ids_S for chat in chats], batch_first=True, padding_value=PADDING)
    return JoinedChats(
        ids_BS,
        pad([chat.modality_S for chat in chats], batch_first=True, padding_value=float(Modality.TEXT)),
        pad([chat.answer_S for chat in chats], batch_first=True),
        pad([torch.ones_like(chat.ids_S, dtype=torch.bool) for chat in chats], batch_first=True),
        _join_images([chat.images for chat in chats if chat.images]),
    )


def _join_images(made: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    joined: dict[str, Tensor] = {}
    for name in made[0] if made else ():
        each = [images[name] for images in made]
        sizes = [max(axis) for axis in zip(*(values.shape[1:] for values in each), strict=True)]
        joined[name] = torch.cat([_grow(values, sizes) for values in each])
    return joined


def _grow(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return values with zeros behind the end of every axis but the first, up to these sizes."""
    missing = [size - length for size, length in zip(sizes, values.shape[1:], strict=True)]
    if not any(missing):
        return values
    return F.pad(values, [amount for each in reversed(missing) for amount in (0, each)])
