"""Looks at the first training texts of a set, and says how many lose their end, before a run begins."""

from collections.abc import Iterator, Mapping
from itertools import islice

from lightning_moevlm.data.format.shard_reader import RawSample, read_shard
from lightning_moevlm.data.read.open_set import OpenSet, find_annotation
from lightning_moevlm.data.text.annotations import choose_answer
from lightning_moevlm.data.text.captions import find_captions
from lightning_moevlm.data.text.tokenizer import CaptionTokenizer

_ENOUGH = 500  # samples
_FRAME = 2  # [BOS] and [EOS]


def describe_cut_texts(
    sets: Mapping[str, OpenSet], tokenizer: CaptionTokenizer, max_text_len: int, appends_answers: bool
) -> Iterator[str]:
    """Yield a line on each source with texts that are cut; sources on a server are left out.

    Args:
        sets: of the sources, by name.
        tokenizer: of their texts.
        max_text_len: ids per text, [BOS] and [EOS] included.
        appends_answers: whether answers follow questions.
    """
    for name, opened in sets.items():
        lengths = _lengths(opened, tokenizer, appends_answers)
        num_cut = sum(length > max_text_len for length in lengths)
        if num_cut:
            yield (
                f"{name}: {num_cut / len(lengths):.1%} of the first {len(lengths)} training texts are longer than "
                f"data.max_text_len {max_text_len} and lose their end; the longest has {max(lengths)} ids. `moevlm "
                f"data check {opened.storage}` names the length that keeps all"
            )


def _lengths(opened: OpenSet, tokenizer: CaptionTokenizer, appends_answers: bool) -> list[int]:
    """Return the ids that texts of the first samples need, as `CaptionTokenizer.encode` counts them."""
    shards, layout = opened.manifest.splits["train"], opened.manifest.layout
    captions = find_captions(opened.members, layout.caption_field)
    if captions is None or not shards or opened.storage.home_of(shards[0]).folder is None:
        return []
    annotation = find_annotation(opened, appends_answers)
    answers = annotation if annotation is not None and annotation.is_appended else None
    wanted = frozenset({captions.member} | ({answers.member} if answers is not None else set()))
    found: list[int] = []
    samples = (sample for shard in shards for sample in read_shard(opened.storage, shard, wanted, layout))
    for sample in islice(samples, _ENOUGH):
        if not isinstance(sample, RawSample):
            continue  # training counts it as lost
        try:
            texts = captions.read(sample.members[captions.member])
            given = None if answers is None else answers.read(sample.members[answers.member])[0]
        except (KeyError, ValueError):
            continue
        tail = 0 if answers is None else len(tokenizer.ids(choose_answer(given or (), "", sample.key))) + 1
        found += [len(tokenizer.ids(text)) + _FRAME + tail for text in texts]
    return found
