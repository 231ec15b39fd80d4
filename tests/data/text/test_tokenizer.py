import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.special_tokens import BOS, EOS, MASK, PAD
from lightning_moevlm.data.format.manifest import TokenizerEntry, read_manifest
from lightning_moevlm.data.text.tokenizer import load_tokenizer, parse_tokenizer, train_tokenizer

CAPTIONS = ["a red apple left of a cat face", "two stars above a red car", "a cat face on a blue ground"] * 5


def test_special_ids_are_fixed() -> None:
    assert (PAD, MASK, BOS, EOS) == (0, 1, 2, 3)


def test_training_is_deterministic_and_spells_everything(tmp_path: Path) -> None:
    entries = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        entries.append(train_tokenizer(CAPTIONS, 300, tmp_path / name))
    assert entries[0] == entries[1]
    assert entries[0].sha256 == hashlib.sha256((tmp_path / "a" / "tokenizer.json").read_bytes()).hexdigest()
    tokenizer = load_tokenizer(tmp_path / "a", entries[0])
    assert tokenizer.vocab_size == entries[0].vocab_size <= 300
    for text in (*CAPTIONS, "Ünïcode 🙂 不明", "[MASK] is only a word"[7:]):
        assert tokenizer.decode(tokenizer.ids(text)) == text


def test_encode_frames_cuts_and_pads(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tmp_path, train_tokenizer(CAPTIONS, 300, tmp_path))
    long, short = "a red apple left of a cat face", "a"
    ids = tokenizer.ids(long)
    assert len(ids) > 4
    text_BL, text_mask_BL, num_cut = tokenizer.encode([long, short], max_text_len=6)
    assert num_cut == 1 and tokenizer.encode([long], max_text_len=len(ids) + 2).num_cut == 0
    assert text_BL.tolist() == [[BOS, *ids[:4], EOS], [BOS, *tokenizer.ids(short), EOS, PAD, PAD, PAD]]
    assert text_mask_BL.tolist() == [[True] * 6, [True] * 3 + [False] * 3]


def test_an_answer_follows_its_question_and_keeps_its_room(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tmp_path, train_tokenizer(CAPTIONS, 300, tmp_path))
    question, answer = tokenizer.ids("a red apple left of a cat face"), tokenizer.ids("cat")
    whole = [BOS, *question, EOS, *answer, EOS]
    found = tokenizer.encode(["a red apple left of a cat face"], len(whole) + 1, ["cat"])
    assert found.text_BL.tolist() == [[*whole, PAD]] and found.num_cut == 0
    found = tokenizer.encode(["a red apple left of a cat face"], len(whole) - 2, ["cat"])
    assert found.text_BL.tolist() == [[BOS, *question[:-2], EOS, *answer, EOS]] and found.num_cut == 1
    assert tokenizer.encode(["a"], 3, ["cat"]).text_BL.tolist() == [[BOS, EOS, EOS]]


def test_control_words_in_a_caption_make_no_control_ids(tmp_path: Path) -> None:
    captions = ["a [PAD] b [MASK] c [EOS][BOS] d", "[PAD][PAD]", "[EOS]"]
    for name, learnt in (("foreign", CAPTIONS), ("learnt", captions * 5)):  # the vocabulary may know the words
        root = tmp_path / name
        root.mkdir()
        entry = train_tokenizer(learnt, 320, root)
        tokenizer = load_tokenizer(root, entry)
        for caption in captions:
            assert not {PAD, MASK, BOS, EOS} & set(tokenizer.ids(caption))
            assert tokenizer.decode(tokenizer.ids(caption)) == caption
        text_BL, text_mask_BL, _ = tokenizer.encode(captions, max_text_len=64)
        for row_L, real_L, caption in zip(text_BL.tolist(), text_mask_BL.tolist(), captions, strict=True):
            length = len(tokenizer.ids(caption)) + 2
            assert real_L == [True] * length + [False] * (64 - length)  # no hole in the mask
            assert [row_L.count(control) for control in (MASK, BOS, EOS)] == [0, 1, 1]


def test_tokens_added_later_are_not_found_in_texts_either(tmp_path: Path) -> None:
    train_tokenizer(CAPTIONS, 300, tmp_path)
    grown = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    before = grown.get_vocab_size()
    grown.add_special_tokens(["<image>"])
    grown.add_tokens(["<code_7>"])  # as codes of a codebook are added, not as special tokens
    data = grown.to_str().encode()
    tokenizer = parse_tokenizer(data, TokenizerEntry("t.json", hashlib.sha256(data).hexdigest(), before + 2), "t.json")
    assert tokenizer.vocab_size == before + 2
    ids = tokenizer.ids("a <image> of <code_7>")
    assert max(ids) < before
    assert tokenizer.decode(ids) == "a <image> of <code_7>"


def test_too_small_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="260"):
        train_tokenizer(CAPTIONS, 259, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_missing_or_altered_tokenizer(scenes_copy: Path) -> None:
    entry = read_manifest(scenes_copy).tokenizer
    with pytest.raises(UserError, match="not the one of its manifest"):
        load_tokenizer(scenes_copy, replace(entry, sha256="0" * 64))
    (scenes_copy / entry.file).unlink()
    with pytest.raises(UserError, match=r"tokenizer .*tokenizer.json is missing"):
        load_tokenizer(scenes_copy, entry)
