"""Tokenizers of other makers: their control tokens are found, numbered first, and never come from texts."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.special_tokens import BOS, EOS, MASK, PAD
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.text.tokenizer import read_tokenizer

CAPTIONS = ["a red apple left of a cat face", "two stars above a red car", "a cat face on a blue ground"] * 5
TEXT = "a red apple left of two stars"


def gpt2_like() -> Tokenizer:
    """Byte-level BPE; one control token, the last id."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        CAPTIONS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.enable_truncation(4)  # as files keep it
    tokenizer.enable_padding(length=20)
    return tokenizer


def roberta_like() -> Tokenizer:
    """Control tokens first in another order, the mask last, texts framed by the file itself."""
    tokenizer = gpt2_like()
    tokenizer.no_truncation()
    tokenizer.no_padding()
    grown = Tokenizer(models.BPE())
    grown.pre_tokenizer, grown.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    grown.train_from_iterator(
        CAPTIONS,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )  # fmt: skip
    grown.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    grown.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return grown


def bert_like() -> Tokenizer:
    """WordPiece, [CLS] and [SEP], lower case."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        CAPTIONS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    )
    return tokenizer


def bare() -> Tokenizer:
    """No control token at all."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, unk_token="<none>", special_tokens=["<none>"], show_progress=False)
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    return tokenizer


def saved(tokenizer: Tokenizer, folder: Path) -> Path:
    tokenizer.save(str(folder / "mine.json"))
    return folder / "mine.json"


@pytest.mark.parametrize(
    ("make", "lacking", "said"),
    [
        (gpt2_like, ["[PAD]", "[MASK]", "[BOS]"], "[EOS] is <|endoftext|>, [PAD], [MASK], [BOS] are added"),
        (roberta_like, [], "[PAD] is <pad>, [MASK] is <mask>, [BOS] is <s>, [EOS] is </s>"),
        (bert_like, [], "[PAD] is [PAD], [MASK] is [MASK], [BOS] is [CLS], [EOS] is [SEP]"),
        (bare, ["[PAD]", "[MASK]", "[BOS]", "[EOS]"], "[PAD], [MASK], [BOS], [EOS] are added"),
    ],
)
def test_a_tokenizer_of_ones_own_gets_our_control_ids(
    make: Callable[[], Tokenizer], lacking: list[str], said: str, tmp_path: Path
) -> None:
    theirs = make()
    tokenizer = read_tokenizer(saved(theirs, tmp_path))
    assert tokenizer.control.lacking == lacking and tokenizer.control.describe() == said
    assert tokenizer.vocab_size == theirs.get_vocab_size() + len(lacking)
    ids = tokenizer.ids(TEXT)
    theirs.no_truncation()
    theirs.no_padding()
    assert len(ids) == len(theirs.encode(TEXT, add_special_tokens=False).ids)  # neither cut, padded nor framed
    assert min(ids) > max(PAD, MASK, BOS, EOS) and max(ids) < tokenizer.vocab_size
    assert tokenizer.decode([BOS, *ids, EOS, PAD]) == TEXT
    hostile = " ".join(name or "x" for name in tokenizer.control.names) + " a cat"
    assert not {PAD, MASK, BOS, EOS} & set(tokenizer.ids(hostile))
    text_BL, text_mask_BL, num_cut = tokenizer.encode([TEXT, "a"], max_text_len=6)
    assert text_BL[0].tolist() == [BOS, *ids[:4], EOS] and num_cut == 1
    assert text_mask_BL[1].sum() == len(tokenizer.ids("a")) + 2


def test_every_id_is_used_once(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(saved(roberta_like(), tmp_path))
    to_model = tokenizer.control.to_model
    assert to_model is not None and sorted(to_model.values()) == list(range(4, tokenizer.vocab_size))
    assert all(tokenizer.control.to_file[model - 4] == file for file, model in to_model.items())


def test_a_set_reads_its_texts_by_it_and_names_the_size_to_set(
    scenes_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = saved(gpt2_like(), tmp_path)
    size = read_tokenizer(file).vocab_size
    sizes = {"batch_size": 4, "image_size": 32, "max_text_len": 96}

    def data(vocab_size: int, tokenizer: Path | None) -> ShardDataModule:
        named = None if tokenizer is None else str(tokenizer)
        return ShardDataModule(str(scenes_root), vocab_size=vocab_size, tokenizer=named, **sizes)  # type: ignore[arg-type]

    own, theirs = data(400, None), data(size, file)
    assert theirs.tokenizer.vocab_size == size and own.manifest_digest != theirs.manifest_digest
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        theirs.prepare_data()
    assert "mine.json: [EOS] is <|endoftext|>, [PAD], [MASK], [BOS] are added" in caplog.text
    one, two = (next(iter(each.val_dataloader())).text_BL.tolist() for each in (own, theirs))
    assert [own.tokenizer.decode(row) for row in one] == [theirs.tokenizer.decode(row) for row in two] and one != two
    with pytest.raises(
        UserError, match=rf"has {size} ids \(\[PAD\], \[MASK\], \[BOS\] included\), .* raise it to {size}"
    ):
        data(size - 1, file).prepare_data()


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 1}')
    (tmp_path / "spm.model").write_bytes(b"\x0a\x0e\x00")
    (tmp_path / "tokenizer.json").write_text("{}")
    for name in ("vocab.json", "spm.model", "tokenizer.json"):
        with pytest.raises(UserError, match=rf"{name} is not a file of the tokenizers library .*save_pretrained"):
            read_tokenizer(tmp_path / name)
    with pytest.raises(
        UserError, match=r"cannot be read \(Is a directory\); name a tokenizer.json, such as .*/tokenizer"
    ):
        read_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        read_tokenizer(tmp_path / "none.json")
    words = Tokenizer(models.WordLevel({"a": 0, "cat": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match=r"cannot spell every text .*: train it with an unknown token"):
        read_tokenizer(saved(words, tmp_path))
    with pytest.raises(UserError, match="makes no ids"):
        read_tokenizer(saved(Tokenizer(models.BPE()), tmp_path))
