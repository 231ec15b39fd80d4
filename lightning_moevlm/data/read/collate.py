"""Makes a `Batch` from raw samples: each is decoded into the batch's memory, and all texts are tokenised together.

Images to be decoded on the device stay JPEGs. Their beginning and end are checked, and the batch gets images on torch's
meta device, which have a shape and no pixels, until they are decoded.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Answers, Batch, Chat, FurtherCaptions
from lightning_moevlm.data.format.faults import MAX_PIXELS, Cause, SampleFault, decode_fault
from lightning_moevlm.data.format.shard_reader import RawSample
from lightning_moevlm.data.images.allocation import Allocate, private_bytes
from lightning_moevlm.data.images.decode import (
    IMAGE_EXTENSIONS,
    check_jpeg,
    decode_image,
    decode_whole,
    image_bytes,
    image_kind,
    image_rows,
)
from lightning_moevlm.data.images.jpeg_batch import Jpeg, JpegBatch
from lightning_moevlm.data.images.open_image import ImageTooLargeError
from lightning_moevlm.data.text.annotations import ANSWERS, Annotation, choose_answer
from lightning_moevlm.data.text.captions import ANNOTATION_EXTENSION, draw_caption, find_captions
from lightning_moevlm.data.text.chat import ChatMaker, Turn, read_turns
from lightning_moevlm.data.text.tokenizer import CaptionTokenizer

_BYTES_PER_ID = torch.int64.itemsize + torch.bool.itemsize


class Decoded(NamedTuple):
    """A decoded sample."""

    key: str
    image_RYX: Tensor | None  # uint8, RGB; None if the set has no images or they are decoded on the device
    caption: str | None  # without surrounding blanks; None if the set has no captions
    jpeg: Jpeg | None = None  # the image, if it is decoded on the device
    answers: tuple[str, ...] = ()  # all answers given to a question
    question_kind: str = ""
    second_RYX: Tensor | None = None  # as image_RYX, of samples with two images
    appended: str = ""  # the answer that follows the question
    further: tuple[str, ...] = ()  # captions of its image beside this one
    chat: Chat | None = None  # the conversation, for a model with a processor of its own
    chat_is_cut: bool = False


class Collate:
    """Makes a batch of raw samples.

    Args:
        members: Members to read.
        tokenizer: Encodes captions.
        image_size: Pixels per side.
        max_text_len: Ids per text, [BOS] and [EOS] included.
        max_pixels: Largest encoded image accepted.
        keeps_jpegs: Whether images, which must be JPEGs, are decoded later, on the device.
        caption_field: Field of the json member with captions; "" for the txt member.
        annotation: Read beside images and texts (`annotations.Annotation`); None for nothing.
        second_image: Member with the second image of each sample; None reads one image.
        chats: Makes conversations of images and texts; None makes none.
    """

    def __init__(
        self,
        members: Sequence[str],
        tokenizer: CaptionTokenizer,
        image_size: int,
        max_text_len: int,
        max_pixels: int = MAX_PIXELS,
        keeps_jpegs: bool = False,
        caption_field: str = "",
        annotation: Annotation | None = None,
        second_image: str | None = None,
        chats: ChatMaker | None = None,
    ) -> None:
        self._chats = chats
        self._image_extension = next((e for e in IMAGE_EXTENSIONS if e in members), None)
        self._captions = find_captions(members, caption_field)
        self._annotation = annotation
        self._appends = annotation is not None and annotation.is_appended
        are_questions = annotation is not None and annotation.name == ANSWERS
        self._keeps_further = self._image_extension is not None and not are_questions
        self._second_image = second_image
        self._tokenizer = tokenizer
        self._image_size = image_size
        self._max_text_len = max_text_len
        self._max_pixels = max_pixels
        self._keeps_jpegs = keeps_jpegs
        assert not keeps_jpegs or self._image_extension in (None, "jpg"), "the data module refuses other formats"

    @property
    def wanted(self) -> frozenset[str]:
        """File extensions to read."""
        captions = () if self._captions is None else (self._captions.member,)
        answers = () if self._annotation is None else (self._annotation.member,)
        images = {self._image_extension, self._second_image} - {None}
        return frozenset((*images, *captions, *answers))

    def __call__(self, samples: Sequence[RawSample]) -> Batch:
        """Decode samples and make a batch of them; a modality that the set lacks is None.

        Raises:
            UserError: if a sample lacks a member or cannot be decoded.
        """
        assert not self._keeps_jpegs, "a batch without pixels needs its JPEGs"
        images_BRYX = self.image_rows(len(samples))
        rows: Sequence[Tensor | None] = [None] * len(samples) if images_BRYX is None else images_BRYX.unbind()
        try:
            decoded = [self.decode(sample, row) for sample, row in zip(samples, rows, strict=True)]
        except SampleFault as fault:
            raise UserError(str(fault)) from fault
        return self.make_batch(decoded, images_BRYX)

    @property
    def bytes_per_sample(self) -> int:
        """Bytes of a sample in the tensors of a batch: image, ids and mask."""
        has_pixels = self._image_extension is not None and not self._keeps_jpegs
        num_images = has_pixels + (self._second_image is not None)
        return num_images * image_bytes(self._image_size) + (
            self._max_text_len * _BYTES_PER_ID if self._captions is not None else 0
        )

    def image_rows(self, num_samples: int, allocate: Allocate = private_bytes) -> Tensor | None:
        """Allocate the images of a batch, (B, 3, S, S) uint8; None if the set has none.

        If JPEGs are kept, they are on the meta device.
        """
        if self._image_extension is None:
            return None
        if self._keeps_jpegs:
            return torch.empty((num_samples, 3, self._image_size, self._image_size), dtype=torch.uint8, device="meta")
        return image_rows(num_samples, self._image_size, allocate)

    def decode(self, sample: RawSample, into: Tensor | None = None, draw: str = "") -> Decoded:
        """Decode one sample.

        Args:
            sample: The sample.
            into: A row of `image_rows` for its image; after a fault it can be used again.
            draw: Seed of the choice among several captions, or answers to append (`captions.draw_caption`); "" takes
                the first caption, and keeps the others.

        Raises:
            SampleFault: if a member is missing, an image is invalid or too large, or a text is empty or not UTF-8.
        """
        image_RYX, caption, jpeg = None, None, None
        further: tuple[str, ...] = ()
        if self._keeps_jpegs and self._image_extension is not None:
            jpeg = self._jpeg(sample, self._image_extension)
        elif self._image_extension is not None:
            image_RYX = self._image(sample, self._image_extension, into)
        if self._captions is not None:
            member = self._captions.member
            try:
                captions = self._captions.read(_member(sample, member))
            except ValueError as error:
                cause: Cause = "text_not_utf8" if isinstance(error, UnicodeError) else "json_malformed"
                raise _fault(cause, sample, member, error) from error
            if not captions:
                raise SampleFault("caption_empty", f"{_place(sample, member)} has no caption; rebuild the set")
            caption = draw_caption(captions, draw, sample.key)
            if self._keeps_further and not draw:
                further = captions[1:]
        answers, kind = ((), "") if self._annotation is None else self._read_annotation(sample, self._annotation)
        second_RYX = None if self._second_image is None else self._image(sample, self._second_image, None)
        appended = choose_answer(answers, draw, sample.key) if self._appends else ""
        decoded = Decoded(sample.key, image_RYX, caption, jpeg, answers, kind, second_RYX, appended, further)
        return decoded if self._chats is None or caption is None else self._converse(sample, decoded, self._chats)

    def _converse(self, sample: RawSample, decoded: Decoded, chats: ChatMaker) -> Decoded:
        """Add the conversation of a sample with a text."""
        try:
            turns = read_turns(sample.members.get(ANNOTATION_EXTENSION))
        except ValueError as error:
            raise _fault("json_malformed", sample, ANNOTATION_EXTENSION, error) from error
        text = decoded.caption or ""
        if not turns:
            turns = (Turn(text, decoded.appended) if self._appends else Turn(chats.options.caption_prompt, text),)
        names = [name for name in (self._image_extension, self._second_image) if name is not None]
        images = [decode_whole(_member(sample, name), image_kind(name) or "image", self._max_pixels) for name in names]
        chat, is_cut = chats.make(images, turns)
        return decoded._replace(chat=chat, chat_is_cut=is_cut)

    def make_batch(self, decoded: Sequence[Decoded], images_BRYX: Tensor | None) -> Batch:
        """Tokenise captions and make a batch. images_BRYX: the rows that the samples were decoded into."""
        text_BL, text_mask_BL, num_cut, further = None, None, 0, None
        if self._captions is not None:
            captions = [each.caption or "" for each in decoded]
            appended = [each.appended for each in decoded] if self._appends else []
            text_BL, text_mask_BL, num_cut = self._tokenizer.encode(captions, self._max_text_len, appended)
            if self._chats is not None:
                num_cut = sum(each.chat_is_cut for each in decoded)
            further = self._encode_further(decoded)
        answers = None
        if self._annotation is not None:
            answers = Answers(tuple(each.answers for each in decoded), tuple(each.question_kind for each in decoded))
        second_BRYX = None
        if self._second_image is not None:
            second_BRYX = image_rows(len(decoded), self._image_size)
            for row_RYX, each in zip(second_BRYX, decoded, strict=True):
                assert each.second_RYX is not None
                row_RYX.copy_(each.second_RYX)
        keys = tuple(each.key for each in decoded)
        chats = tuple(each.chat for each in decoded if each.chat is not None) or None
        return Batch(
            images_BRYX, text_BL, text_mask_BL, keys, num_cut=(num_cut,), answers=answers,
            second_images_BRYX=second_BRYX, further_captions=further, chats=chats,
        )  # fmt: skip

    def _encode_further(self, decoded: Sequence[Decoded]) -> FurtherCaptions | None:
        said = [(number, text) for number, each in enumerate(decoded) for text in each.further]
        if not said:
            return None
        pairs, texts = zip(*said, strict=True)
        text_ML, text_mask_ML, _ = self._tokenizer.encode(texts, self._max_text_len)
        return FurtherCaptions(text_ML, text_mask_ML, pairs)

    def pack_jpegs(self, decoded: Sequence[Decoded], num_fresh: int) -> JpegBatch | None:
        """Pack the JPEGs of a batch; None if images are decoded already.

        num_fresh: Samples at the beginning that are read for the first time in their epoch.
        """
        jpegs = [each.jpeg for each in decoded if each.jpeg is not None]
        return JpegBatch.pack(jpegs, num_fresh) if jpegs else None

    def _read_annotation(self, sample: RawSample, annotation: Annotation) -> tuple[tuple[str, ...], str]:
        """Return the answers to a sample's question, or its class, and the kind of question."""
        member = annotation.member
        try:
            answers, kind = annotation.read(_member(sample, member))
        except ValueError as error:
            raise _fault("json_malformed", sample, member, error) from error
        if answers is None:
            message = f"{_place(sample, member)} has no {annotation.what}; {annotation.remedy}"
            raise SampleFault("answer_missing", message)
        return answers, kind

    def _jpeg(self, sample: RawSample, extension: str) -> Jpeg:
        data = _member(sample, extension)
        try:
            check_jpeg(data, self._max_pixels)
        except ImageTooLargeError as error:
            raise _fault("image_too_large", sample, extension, error) from error
        except ValueError as error:
            raise _fault("image_undecodable", sample, extension, error) from error
        return Jpeg(data, _place(sample, extension))

    def _image(self, sample: RawSample, extension: str, into: Tensor | None) -> Tensor:
        kind = image_kind(extension)
        assert kind is not None
        try:
            return decode_image(_member(sample, extension), kind, self._image_size, self._max_pixels, into)
        except ImageTooLargeError as error:
            raise _fault("image_too_large", sample, extension, error) from error
        except ValueError as error:
            raise _fault("image_undecodable", sample, extension, error) from error


def _member(sample: RawSample, extension: str) -> bytes:
    if extension not in sample.members:
        message = f"{sample.key} in shard {sample.shard} has no .{extension} member; rebuild the set"
        raise SampleFault("member_missing", message)
    return sample.members[extension]


def _fault(cause: Cause, sample: RawSample, extension: str, error: ValueError) -> SampleFault:
    return decode_fault(cause, _place(sample, extension), error)


def _place(sample: RawSample, extension: str) -> str:
    return f"{sample.key}.{extension} in shard {sample.shard}"
