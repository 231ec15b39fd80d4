"""Batches of statements about two images."""

from lightning_moevlm.contracts.batch import Answers, Batch
from tests.small_model import cut, pair_batch, uneven_batch


def statement_batch(num_samples: int) -> Batch:
    """Random images and texts, of kinds `both` and `more` in turns; every third is false of `both`, half of `more`."""
    kinds = tuple(("both", "more")[row % 2] for row in range(num_samples))
    is_true = [row % 3 != 0 if kind == "both" else row % 4 == 1 for row, kind in enumerate(kinds)]
    answers = Answers(tuple((str(truth).lower(),) for truth in is_true), kinds)
    second = pair_batch(num_samples, seed=1).images_BRYX
    return uneven_batch(num_samples)._replace(answers=answers, second_images_BRYX=second)


def cut_statements(batch: Batch, size: int) -> list[Batch]:
    """The same statements in batches of at most so many."""
    assert batch.answers is not None and batch.second_images_BRYX is not None
    starts = range(0, batch.num_samples, size)
    return [
        part._replace(
            answers=batch.answers.select(range(start, start + part.num_samples)),
            second_images_BRYX=batch.second_images_BRYX[start : start + part.num_samples],
        )
        for start, part in zip(starts, cut(batch, size), strict=True)
    ]
