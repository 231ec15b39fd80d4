"""Counts the answers to the training questions of a set, for models that choose from the most frequent ones."""

from collections import Counter

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.progress import track
from lightning_moevlm.contracts.answer_list import AnswerList, Coverage
from lightning_moevlm.data.format.shard_reader import read_shard, require_all
from lightning_moevlm.data.read.collate import Collate
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from lightning_moevlm.data.text.captions import ANNOTATION_EXTENSION


def count_answers(storage: ShardStorage, num_answers: int | None) -> tuple[AnswerList, Coverage]:
    """Return the most frequent answers and the questions that they cover; all answers if `num_answers` is None.

    A question counts once for each of its different answers. Equal counts are in alphabetical order.

    Raises:
        UserError: if the set is invalid, or its samples have no answers.
    """
    manifest = storage.read_manifest()
    if ANNOTATION_EXTENSION not in manifest.members:
        raise UserError(
            f"samples of {storage} have no json member with answers; `moevlm data convert questions SET` "
            "makes a set of the questions of another"
        )
    collate = Collate((), storage.read_tokenizer(manifest.tokenizer), 0, 2, reads_answers=True)
    counts: Counter[str] = Counter()
    questions: list[frozenset[str]] = []
    shards = manifest.splits["train"]
    for entry in track(shards, len(shards), "counting answers"):
        for sample in require_all(read_shard(storage, entry, frozenset({ANNOTATION_EXTENSION}), manifest.layout)):
            given = frozenset(collate.decode(sample).answers)
            counts.update(given)
            questions.append(given)
    chosen = sorted(counts, key=lambda answer: (-counts[answer], answer))[:num_answers]
    covered = set(chosen)
    share = sum(not given.isdisjoint(covered) for given in questions) / len(questions)
    answers = AnswerList(tuple(chosen), tuple(counts[answer] for answer in chosen), manifest.digest)
    return answers, Coverage(len(questions), share)
