"""Makes conversations of samples with the processor and chat template of a model of transformers.

    question, answer         one turn; several turns if the sample's json member has `turns`
    caption                  one turn, whose question is `caption_prompt`
    text before an answer    template(turns so far, generation prompt), as the model gets it in generation
    answer                   what the template writes after that, up to the token that ends it

Each piece is encoded on its own, so that a prompt has the same ids in training and in generation. Images belong to the
first piece, which the processor encodes: it scales them as the model was trained and puts a row of placeholders where
each one stands. Only ids of answers, their ends included, are to be predicted.
"""

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from PIL import Image

from lightning_moevlm.common.errors import UserError, say_missing_package
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.batch import Chat
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.data.text.texts import strip_text

TURNS = "turns"
"""Field of the json member: a list of [question, answer]."""

_NOT_OF_IMAGES = {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids"}
_KEPT_FILES = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
_LARGE = "*.index.json"  # of weights
_OF_LOADING = ("trust_remote_code", "revision", "use_fast", "backend", "padding_side", "truncation_side")
"""Options that transformers reads before those of images."""


@dataclass(frozen=True)
class ChatOptions:
    """Samples as conversations of a model's own processor (extra `hf`).

    Args:
        processor: directory of the model, with its processor, tokenizer and chat template.
        max_len: most tokens of a conversation, images included; a longer one loses the end of its answers.
        system: message before the first turn; null leaves it out.
        caption_prompt: what a caption answers. A text that an answer follows (`data.append_answer`) is a question.
        template: file with a chat template in place of the processor's own; null takes its own.
        options: for the processor, such as its bounds on the pixels of an image.
        local_files_only: never fetch; false takes `processor` from the hub too.

    Raises:
        UserError: a max_len below 2.
    """

    processor: str
    max_len: int = 2048
    system: str | None = None
    caption_prompt: str = "Describe the image."
    template: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    local_files_only: bool = True

    def __post_init__(self) -> None:
        """Check the range."""
        check_number("data.chat.max_len", self.max_len, least=2)


class Turn(NamedTuple):
    """A question with its answer."""

    question: str
    answer: str


def read_turns(annotation: bytes | None) -> tuple[Turn, ...]:
    """Return the turns that a sample's json member has; none if it has no such field.

    Raises:
        ValueError: it is not JSON, or the field is no list of pairs of texts.
    """
    content = {} if annotation is None else json.loads(annotation.decode("utf-8-sig"))
    turns = content.get(TURNS) if isinstance(content, dict) else None
    if turns is None:
        return ()
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise ValueError(f"field {TURNS!r} is not a list of [question, answer]")
    found = tuple(Turn(*(strip_text(text) if isinstance(text, str) else "" for text in turn)) for turn in turns)
    if not all(turn.answer for turn in found):
        raise ValueError(f"field {TURNS!r} has an answer that is no text")
    return found


class ChatMaker:
    """Makes conversations; the processor is loaded when the first one is made.

    Args:
        options: those of the data.
        unread: options by name that change images and texts of a batch, which its conversations are not made of.

    Raises:
        UserError: one of these is set.
    """

    def __init__(self, options: ChatOptions, unread: Mapping[str, object] = MappingProxyType({})) -> None:
        self.options = options
        for name, value in unread.items():
            if value is not None:
                raise UserError(
                    f"data.{name} changes the images or texts of a batch, and conversations are made of those of the "
                    f"set: set data.{name} or data.chat to null"
                )

    def __getstate__(self) -> dict[str, Any]:
        """Leave the processor out: each process loads its own."""
        return {"options": self.options}

    @cached_property
    def processor(self) -> Any:
        """The model's processor; of a language model, its tokenizer.

        Raises:
            UserError: transformers is missing, or there is no processor with a chat template.
        """
        try:
            import transformers
        except ImportError as error:
            raise UserError(
                "data.chat needs transformers, which is not installed: pip install 'lightning-moevlm[hf]'"
            ) from error
        place = f"data.chat.processor {self.options.processor}"
        try:
            processor = transformers.AutoProcessor.from_pretrained(
                self.options.processor, local_files_only=self.options.local_files_only, **self.options.options
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
            missing = say_missing_package(error)
            if missing is not None:
                raise UserError(f"{place} {missing}") from error
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"{place} cannot be loaded: {type(error).__name__}: {reason}; give the directory of a model with its "
                "processor"
            ) from error
        if self.options.template is not None:
            processor.chat_template = _read_template(self.options.template)
        if not getattr(processor, "chat_template", None) and not getattr(
            self._tokenizer(processor), "chat_template", ""
        ):
            raise UserError(f"{place} has no chat template: set data.chat.template to a file with one")
        self._refuse_unread(processor)
        return processor

    @property
    def tokenizer(self) -> Any:
        """The tokenizer inside the processor."""
        return self._tokenizer(self.processor)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Ids that end an answer: the tokenizer's, and those that the model generates up to."""
        ends = [self.tokenizer.eos_token_id]
        file = Path(self.options.processor) / "generation_config.json"
        if file.is_file():
            named = json.loads(file.read_text("utf-8")).get("eos_token_id")
            ends += named if isinstance(named, list) else [named]
        found = tuple(dict.fromkeys(id_ for id_ in ends if id_ is not None))
        if not found:
            raise UserError(
                f"the tokenizer of data.chat.processor {self.options.processor} has no token that ends a text"
            )
        return found

    @property
    def digest(self) -> str:
        """Hash of the files that decide what is made of a sample."""
        folder = Path(self.options.processor)
        files = sorted({file for kind in _KEPT_FILES for file in folder.glob(kind)} - set(folder.glob(_LARGE)))
        if self.options.template is not None:
            files.append(Path(self.options.template))
        read = hashlib.sha256()
        for file in files:
            read.update(f"{file.name}\n".encode() + file.read_bytes())
        return read.hexdigest()

    def make(self, images: Sequence[Image.Image], turns: Sequence[Turn]) -> tuple[Chat, bool]:
        """Return the conversation of a sample, and whether it lost its end.

        Args:
            images: RGB, of any size; they stand before the first question.
            turns: at least one.

        Raises:
            UserError: the processor takes no images, the template rewrites what stands before an answer, or the first
                question is longer than `max_len`.
        """
        ids: list[int] = []
        is_answer: list[bool] = []
        before = ""
        made: dict[str, Any] = {}
        first_modality = torch.empty(0, dtype=torch.int64)
        for number, turn in enumerate(turns):
            asked, answered = self._render(images, turns[:number], turn)
            if not (asked.startswith(before) and answered.startswith(asked)):
                raise UserError(
                    f"the chat template of {self.options.processor} writes something else before an answer in training "
                    "than in generation, as templates with thoughts do: set data.chat.template to one that does not"
                )
            if number == 0:
                piece, first_modality, made = self._encode_first(asked, images)
            else:
                piece = self._encode(asked[len(before) :])
            answer, rest = self._split(self._encode(answered[len(asked) :]))
            ids += [*piece, *answer, *rest]
            is_answer += [False] * len(piece) + [True] * len(answer) + [False] * len(rest)
            before = answered
        modality_S = torch.full((len(ids),), int(Modality.TEXT))
        modality_S[: len(first_modality)] = first_modality
        return self._cut(Chat(torch.tensor(ids), modality_S, torch.tensor(is_answer), made))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a generated answer, up to its end."""
        end = next((place for place, id_ in enumerate(ids) if id_ in self.ends), len(ids))
        return str(self.tokenizer.decode(list(ids[:end]), skip_special_tokens=True)).strip()

    def encode_answer(self, answer: str) -> list[int]:
        """Return the ids of an answer that a model may give, its end included."""
        return [*self._encode(answer), self.ends[0]]

    @staticmethod
    def _tokenizer(processor: Any) -> Any:
        return getattr(processor, "tokenizer", processor)

    @property
    def _sees(self) -> bool:
        return hasattr(self.processor, "image_processor")

    def _render(self, images: Sequence[Image.Image], before: Sequence[Turn], turn: Turn) -> tuple[str, str]:
        """Return the text up to an answer, and with it."""
        messages: list[dict[str, Any]] = []
        if self.options.system is not None:
            messages.append(self._message("system", self.options.system))
        for number, each in enumerate([*before, turn]):
            messages.append(self._message("user", each.question, len(images) if number == 0 else 0))
            messages.append(self._message("assistant", each.answer))
        render = self.processor.apply_chat_template
        with self._explained("the chat template", "set data.chat.template to a file with one that takes these turns"):
            return (
                render(messages[:-1], tokenize=False, add_generation_prompt=True),
                render(messages, tokenize=False),
            )

    def _message(self, role: str, text: str, num_images: int = 0) -> dict[str, Any]:
        if not self._sees:
            if num_images:
                raise UserError(
                    f"data.chat.processor {self.options.processor} takes no images: give its sources `modality: text`, "
                    "or choose a vision-language model"
                )
            return {"role": role, "content": text}
        return {"role": role, "content": [*[{"type": "image"}] * num_images, {"type": "text", "text": text}]}

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _encode_first(self, text: str, images: Sequence[Image.Image]) -> tuple[list[int], torch.Tensor, dict[str, Any]]:
        """Return ids and modalities of the text up to the first answer, and what was made of its images."""
        begins = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        inputs: dict[str, Any] = {"add_special_tokens": not begins, "return_tensors": "pt"}
        if images:
            inputs["images"] = list(images)
        remedy = (
            "give a data.chat.template that puts a placeholder for each image, and options that the processor takes"
        )
        with self._explained("the processor", remedy):
            made = dict(self.processor(text=[text], **inputs))
        ids_S = made["input_ids"][0]
        modality_S = torch.full_like(ids_S, int(Modality.TEXT))
        if images:
            kinds = made.get("mm_token_type_ids")
            is_image_S = kinds[0] == 1 if kinds is not None else ids_S == self._placeholder
            modality_S[is_image_S] = int(Modality.IMAGE)
        of_images = {name: values for name, values in made.items() if name not in _NOT_OF_IMAGES}
        return ids_S.tolist(), modality_S, of_images

    def _refuse_unread(self, processor: Any) -> None:
        """Refuse options of images that the processor would pass over, as transformers does."""
        parts = [getattr(processor, name, None) for name in ("image_processor", "video_processor")]
        read = {name for part in parts for name in getattr(getattr(part, "valid_kwargs", None), "__annotations__", ())}
        others = {*_OF_LOADING, *inspect.signature(type(processor).__init__).parameters}
        for name in self.options.options:
            if read and name not in read | others:
                raise UserError(
                    f"data.chat.options has {name}, which {type(processor.image_processor).__name__} of "
                    f"{self.options.processor} does not read: name some of {', '.join(sorted(read))}"
                )

    @contextmanager
    def _explained(self, part: str, remedy: str) -> Iterator[None]:
        """Turn what the template or the processor says of a conversation into one message."""
        try:
            yield
        except Exception as error:  # templates raise what jinja and their own code raise, processors their libraries'
            cause = error if error.__cause__ is None else error.__cause__
            reason = " ".join(str(cause).split())
            raise UserError(
                f"{part} of data.chat.processor {self.options.processor} refuses a conversation: "
                f"{type(cause).__name__}: {reason}; {remedy}"
            ) from error

    @property
    def _placeholder(self) -> int:
        known = getattr(self.processor, "image_token_id", None)
        return int(known if known is not None else self.tokenizer.convert_tokens_to_ids(self.processor.image_token))

    def _split(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Split what the template writes for an answer after the token that ends it, which it gets if it has none."""
        place = next((place for place, id_ in enumerate(ids) if id_ in self.ends), None)
        if place is None:
            return [*ids, self.ends[0]], []
        return ids[: place + 1], ids[place + 1 :]

    def _cut(self, chat: Chat) -> tuple[Chat, bool]:
        most = self.options.max_len
        if len(chat.ids_S) <= most:
            return chat, False
        if not bool(chat.answer_S[:most].any()):
            raise UserError(
                f"an image and its question have {len(chat.prompt().ids_S)} tokens, and data.chat.max_len is {most}: "
                "raise it, or bound the pixels of images by data.chat.options"
            )
        return Chat(chat.ids_S[:most], chat.modality_S[:most], chat.answer_S[:most], chat.images), True


def _read_template(file: str) -> str:
    try:
        return Path(file).read_text("utf-8")
    except (OSError, UnicodeError) as error:
        raise UserError(f"data.chat.template {file} cannot be read: {error}") from None
