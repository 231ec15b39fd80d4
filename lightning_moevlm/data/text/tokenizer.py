"""Encodes texts with the set's own tokenizer, byte-level BPE trained on its training captions, or with a user's file.

Nothing is downloaded. The vocabulary is trained when the set is built and lies beside the shards; its hash is in the
manifest. Byte-level BPE can spell every text, so no id for "unknown" is needed. Training is deterministic: the same
captions give the same file. Any `tokenizer.json` of the tokenizers library serves as well.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.special_tokens import BOS, EOS, MASK, PAD, SPECIAL_TOKENS
from lightning_moevlm.data.format.manifest import TokenizerEntry, file_sha256
from lightning_moevlm.data.text.control_ids import number_ids

TOKENIZER_FILE = "tokenizer.json"
_PROBE = "A dog, 2 × 3 cats 漢字 🙂"
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256
"""Special tokens and one token per byte."""


class EncodedText(NamedTuple):
    """A batch of encoded texts."""

    text_BL: Tensor  # int64 ids, padded with PAD
    text_mask_BL: Tensor  # bool, True on real tokens
    num_cut: int  # texts that were cut


class CaptionTokenizer:
    """Converts texts to ids and back: [BOS] ids [EOS], cut or padded to a fixed length.

    Texts never become control ids: `[PAD]` in a caption is an ordinary word.

    control: how the file's ids are numbered here.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.control = number_ids(tokenizer)
        self._tokenizer = tokenizer
        # the same model without added tokens, which would be found in texts, and without padding and truncation
        self._plain = Tokenizer(tokenizer.model)
        self._plain.normalizer, self._plain.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self.control.vocab_size

    def to_json(self) -> str:
        """Return the content of its file."""
        return str(self._tokenizer.to_str())

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text, without [BOS] and [EOS]."""
        # one at a time on purpose: encode_batch starts threads, which a forked worker must not inherit, and it is not
        # faster without them
        ids = self._plain.encode(text, add_special_tokens=False).ids
        to_model = self.control.to_model
        return ids if to_model is None else [to_model[id_] for id_ in ids if id_ in to_model]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Return where each of the text's `ids` stands: its first character, and the first after it."""
        encoding, to_model = self._plain.encode(text, add_special_tokens=False), self.control.to_model
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        return [span for id_, span in pairs if to_model is None or id_ in to_model]

    def encode(self, texts: Sequence[str], max_text_len: int, answers: Sequence[str] = ()) -> EncodedText:
        """Encode texts to (B, max_text_len). A longer text loses its end and keeps its [EOS].

        With answers, one for each text, [BOS] text [EOS] answer [EOS]; the text is cut, so that the answer has room.
        """
        ids_BL = np.full((len(texts), max_text_len), PAD, dtype=np.int64)  # rows of numpy are filled faster
        num_cut = 0
        tails = [[*self.ids(answer)[: max_text_len - 3], EOS] for answer in answers] or [[]] * len(texts)
        for row_L, text, tail in zip(ids_BL, texts, tails, strict=True):
            ids, room = self.ids(text), max_text_len - 2 - len(tail)
            num_cut += len(ids) > room
            framed = [BOS, *ids[:room], EOS, *tail]
            row_L[: len(framed)] = framed
        text_BL = torch.from_numpy(ids_BL)
        return EncodedText(text_BL, text_BL != PAD, num_cut)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        ids = [i for i in ids if i >= len(SPECIAL_TOKENS)]
        if self.control.to_model is not None:
            ids = [self.control.to_file[i - len(SPECIAL_TOKENS)] for i in ids if i < self.vocab_size]
        return str(self._tokenizer.decode(ids))


def check_vocab_size(vocab_size: int) -> None:
    """Refuse a vocabulary that cannot spell every text.

    Raises:
        UserError: if `vocab_size` leaves no room for special tokens and bytes.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"vocab_size is {vocab_size}: bytes and special tokens alone need {MIN_VOCAB_SIZE}")


def train_tokenizer(captions: Iterable[str], vocab_size: int, root: Path) -> TokenizerEntry:
    """Train at most `vocab_size` ids on captions, and write `root/tokenizer.json`.

    Raises:
        UserError: if `vocab_size` leaves no room for special tokens and bytes.
    """
    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [PAD, MASK, BOS, EOS]
    path, unfinished = root / TOKENIZER_FILE, root / f".{TOKENIZER_FILE}.unfinished"
    unfinished.write_text(tokenizer.to_str(), encoding="utf-8")
    unfinished.replace(path)
    return TokenizerEntry(path.name, file_sha256(path), int(tokenizer.get_vocab_size()))


def copy_tokenizer(source: Path, root: Path) -> TokenizerEntry:
    """Copy the tokenizer of another set to `root/tokenizer.json`.

    Raises:
        UserError: if the file is missing or is not a tokenizer.
    """
    if not source.is_file():
        raise UserError(f"tokenizer {source} is missing; restore it or rebuild its set with --force true")
    data = source.read_bytes()
    entry = TokenizerEntry(TOKENIZER_FILE, hashlib.sha256(data).hexdigest(), 0)
    num_ids = parse_tokenizer(data, entry, str(source)).vocab_size
    path, unfinished = root / TOKENIZER_FILE, root / f".{TOKENIZER_FILE}.unfinished"
    unfinished.write_bytes(data)
    unfinished.replace(path)
    return replace(entry, vocab_size=num_ids)


def load_tokenizer(root: Path, entry: TokenizerEntry) -> CaptionTokenizer:
    """Load a set's tokenizer from the set's folder.

    Raises:
        UserError: if the file is missing, differs from the manifest or is not a tokenizer.
    """
    path = root / entry.file
    if not path.is_file():
        raise UserError(f"tokenizer {path} is missing; restore it or rebuild the set with --force true")
    return parse_tokenizer(path.read_bytes(), entry, str(path))


def read_tokenizer(path: Path | str) -> CaptionTokenizer:
    """Read a tokenizer that belongs to no set: a user's own, or that of an exported model.

    Raises:
        UserError: if the file is missing, is not a tokenizer of the tokenizers library, or cannot spell texts.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        inside = f", such as {path / TOKENIZER_FILE}" if (path / TOKENIZER_FILE).is_file() else ""
        raise UserError(f"tokenizer {path} cannot be read ({error.strerror}); name a tokenizer.json{inside}") from None
    try:
        tokenizer = CaptionTokenizer(Tokenizer.from_buffer(data))
    except ValueError as error:
        raise UserError(
            f"tokenizer {path} is not a file of the tokenizers library ({error}); write one with "
            "`Tokenizer.save('tokenizer.json')`, or with `save_pretrained` of a fast tokenizer of transformers"
        ) from None
    try:
        spelled = tokenizer.ids(_PROBE)
    except Exception as error:  # the library raises a bare Exception
        raise UserError(
            f"tokenizer {path} cannot spell every text ({error}): train it with an unknown token, or at byte level"
        ) from None
    if not spelled:
        raise UserError(f"tokenizer {path} makes no ids of {_PROBE!r}: name a tokenizer that was trained")
    return tokenizer


def parse_tokenizer(data: bytes, entry: TokenizerEntry, place: str) -> CaptionTokenizer:
    """Make a tokenizer of the bytes of its file. place: of the file, for messages.

    Raises:
        UserError: if the bytes differ from the manifest or are not a tokenizer.
    """
    found = hashlib.sha256(data).hexdigest()
    if found != entry.sha256:
        raise UserError(
            f"tokenizer {place} is not the one of its manifest: sha256 {found[:12]}..., expected "
            f"{entry.sha256[:12]}...; restore it or rebuild the set with --force true"
        )
    try:
        return CaptionTokenizer(Tokenizer.from_buffer(data))
    except ValueError as error:
        raise UserError(
            f"tokenizer {place} is not a file of the tokenizers library ({error}); rebuild the set"
        ) from None
