"""Recall of retrieval, held against a double loop."""

import itertools

import pytest
import torch

from lightning_moevlm.contracts.step_records import Embeddings
from lightning_moevlm.model.metrics.tasks.retrieval import join_embeddings, retrieval_recalls


def embeddings(
    image_ND: torch.Tensor, text_ND: torch.Tensor, image_ids: list[int] | None = None, text_ids: list[int] | None = None
) -> Embeddings:
    num = len(image_ND)
    keys = tuple(f"{index:04d}" for index in range(num))
    return Embeddings(keys, image_ND, text_ND, tuple(image_ids or range(num)), tuple(text_ids or range(num)))


def recalls(of: Embeddings) -> dict[tuple[str, int], float]:
    return {(each.direction, each.at): each.recall for each in retrieval_recalls(of)}


def by_loops(
    queries: list[tuple[int, torch.Tensor]], candidates: list[tuple[int, torch.Tensor]], pairs: set, k: int
) -> float:
    hits = 0
    for query, own_D in queries:
        scores = sorted(((float(own_D @ other_D), which) for which, other_D in candidates), reverse=True)
        hits += any((query, which) in pairs for _, which in scores[:k])
    return hits / len(queries)


@pytest.mark.parametrize("seed", range(5))
def test_recalls_equal_a_double_loop_where_images_have_several_texts(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    image_ids = torch.randint(0, 17, (60,), generator=generator).tolist()
    text_ids = torch.randint(0, 40, (60,), generator=generator).tolist()
    image_D = torch.randn(17, 8, generator=generator, dtype=torch.float64)
    text_D = torch.randn(40, 8, generator=generator, dtype=torch.float64)
    found = recalls(embeddings(image_D[image_ids], text_D[text_ids], image_ids, text_ids))
    images = [(each, image_D[each]) for each in sorted(set(image_ids))]
    texts = [(each, text_D[each]) for each in sorted(set(text_ids))]
    pairs = set(zip(image_ids, text_ids, strict=True))
    swapped = {(text, image) for image, text in pairs}
    for k in (1, 5, 10):
        assert found["image_to_text", k] == pytest.approx(by_loops(images, texts, pairs, k))
        assert found["text_to_image", k] == pytest.approx(by_loops(texts, images, swapped, k))


def test_features_that_are_all_alike_recall_nothing() -> None:
    alike = torch.ones(20, 4)
    assert set(recalls(embeddings(alike, alike)).values()) == {0.0}


def test_a_perfect_match_recalls_everything() -> None:
    own = torch.eye(12)
    assert set(recalls(embeddings(own, own)).values()) == {1.0}


def test_chance_by_hand() -> None:
    # 4 texts, two of them of image 0: one draw of four finds one with 1/2 and 1/4, two images of three texts
    own = torch.eye(3)
    of = embeddings(own[[0, 0, 1]], own, [0, 0, 1], [0, 1, 2])
    chance = {(each.direction, each.at): each.chance for each in retrieval_recalls(of)}
    assert chance["image_to_text", 1] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert chance["text_to_image", 1] == pytest.approx(1 / 2)
    assert chance["image_to_text", 5] == 1.0


def test_parts_are_joined_by_key_and_repeated_samples_count_once() -> None:
    whole = embeddings(torch.randn(6, 4), torch.randn(6, 4))
    rows = [Embeddings(*(field[start:stop] for field in whole)) for start, stop in ((3, 6), (0, 4))]
    joined = join_embeddings(rows)
    assert joined.keys == whole.keys and joined.text_ids == whole.text_ids
    assert torch.equal(joined.image_ND, whole.image_ND)
    assert list(itertools.chain(*recalls(joined).items())) == list(itertools.chain(*recalls(whole).items()))
