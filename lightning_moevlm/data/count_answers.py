"""Counts the answers or classes of a set's training samples, for models that choose from the most frequent ones."""

from collections import Counter

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.progress import track
from lightning_moevlm.contracts.answer_list import AnswerList, Coverage
from lightning_moevlm.data.format.faults import SampleFault
from lightning_moevlm.data.format.shard_reader import read_shard, require_all
from lightning_moevlm.data.read.collate import Collate
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from lightning_moevlm.data.text.annotations import Annotation
from lightning_moevlm.data.text.captions import ANNOTATION_EXTENSION


def count_answers(
    storage: ShardStorage, num_answers: int | None, annotation: Annotation
) -> tuple[AnswerList, Coverage]:
    """Return the most frequent answers and the questions that they cover; all answers if `num_answers` is None.

    A question counts once for each of its different answers. Equal counts are in alphabetical order.

    Raises:
        UserError: if the set is invalid, or its samples have no answers.
    """
    manifest = storage.read_manifest()
    if annotation.member == ANNOTATION_EXTENSION and ANNOTATION_EXTENSION not in manifest.members:
        raise UserError(f"{storage} has no {annotation.what}: its samples have no json member; {annotation.remedy}")
    collate = Collate((), storage.read_tokenizer(manifest.tokenizer), 0, 2, annotation=annotation)
    counts: Counter[str] = Counter()
    questions: list[frozenset[str]] = []
    shards = manifest.splits["train"]
    for entry in track(shards, len(shards), "counting answers"):
        for sample in require_all(read_shard(storage, entry, collate.wanted, manifest.layout)):
            try:
                given = frozenset(collate.decode(sample).answers)
            except SampleFault as fault:
                raise UserError(str(fault)) from fault
            counts.update(given)
            if given:
                questions.append(given)
    if not questions:
        raise UserError(f"no training sample of {storage} has {annotation.what}; {annotation.remedy}")
    chosen = sorted(counts, key=lambda answer: (-counts[answer], answer))[:num_answers]
    covered = set(chosen)
    share = sum(not given.isdisjoint(covered) for given in questions) / len(questions)
    answers = AnswerList(tuple(chosen), tuple(counts[answer] for answer in chosen), manifest.digest)
    return answers, Coverage(len(questions), share)
