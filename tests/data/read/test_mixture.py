"""Several sources in one stream of batches: who gives how much, in which order, and that a resumed run is exact."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.schedules import Ramp
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.format.manifest import read_manifest
from lightning_moevlm.data.load.shard_loader import ShardLoader
from lightning_moevlm.data.read.join_batches import join_batches
from lightning_moevlm.data.read.mixture import Mixture, Pause, Source, StepClock, counts
from lightning_moevlm.data.write.demo.scenes import build_scenes


@pytest.fixture(scope="module")
def drawings_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second set: 60 scenes of 32 pixels in shards of 10, png."""
    root = tmp_path_factory.mktemp("sets") / "drawings"
    build_scenes(root, 60, 32, "png", 16, seed=8, samples_per_shard=10, vocab_size=300, force=False)
    return root


def _data(sources: dict[str, Source | None], **options: Any) -> ShardDataModule:
    given = {"batch_size": 10, "image_size": 32, "max_text_len": 16, "vocab_size": 400, "shuffle_buffer": 7}
    return ShardDataModule(root=None, sources=sources, **{**given, **options})


def _three(scenes: Path, drawings: Path) -> dict[str, Source | None]:
    return {
        "texts": Source(str(drawings), 0.2, "text"),
        "pairs": Source(str(scenes), 0.5),
        "images": Source(str(drawings), 0.3, "image"),
    }


def test_counts_by_hand() -> None:
    assert counts([3, 1], 8, 0.0) == counts([3, 1], 8, 0.9) == (6, 2)  # shares 6 and 2: nothing to round
    # three samples for 1 : 1, reached 1.5 and 3: floor(1.5) = 1 and 2, or floor(1.5 + 0.6) = 2 and 1
    assert counts([1, 1, 0], 3, 0.0) == (1, 2, 0)
    assert counts([1, 1, 0], 3, 0.6) == (2, 1, 0)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=1, max_size=6).filter(any),
    st.integers(1, 64),
    st.floats(0, 1, exclude_max=True),
)
def test_every_share_is_right_to_within_one_sample(weights: list[float], batch_size: int, offset: float) -> None:
    found = counts(weights, batch_size, offset)
    assert sum(found) == batch_size
    for weight, count in zip(weights, found, strict=True):
        assert abs(count - weight / sum(weights) * batch_size) < 1 + 1e-9
        assert count >= 0 and (count == 0 or weight > 0)


def test_shares_stay_right_over_thousands_of_batches() -> None:
    # independent draws would be off by sqrt(80,000 x 0.37 x 0.63) = 137
    mixture, clock = Mixture((Source("a", 0.37), Source("b", 0.63))), StepClock(100)
    total = sum(mixture.counts(number // 100, number % 100, 8, clock)[0] for number in range(10_000))
    assert total == pytest.approx(80_000 * 0.37, abs=5)


def test_weights_follow_the_optimiser_step() -> None:
    # 2 batches a step, 4 batches an epoch, so epoch 1 begins at step 2
    clock = StepClock(4, 2)
    assert [clock.step(epoch, batch) for epoch in (0, 1) for batch in range(4)] == [0, 0, 1, 1, 2, 2, 3, 3]
    ramped = Source("a", Ramp(0.0, 1.0, num_steps=4))
    assert [ramped.weight_at(step) for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    mixture = Mixture((Source("pairs"), Source("texts", 1.0, "text", Pause(begin=1, num_steps=2))))
    given = [mixture.counts(epoch, batch, 4, clock) for epoch in (0, 1) for batch in range(4)]
    assert given == [(2, 2)] * 2 + [(4, 0)] * 4 + [(2, 2)] * 2


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ((Source("a", 0.0), Source("b", 0.0)), "weight 0 after 0 optimiser steps"),
        ((Source("a", Ramp(1.0, 0.0, 5, 10)), Source("b", Ramp(1.0, 0.0, 3))), "weight 0 after 15 optimiser steps"),
        ((Source("a", pause=Pause(5, 9)), Source("b", pause=Pause(8, 2))), "weight 0 after 8 optimiser steps"),
    ],
)
def test_a_step_without_data_is_refused(sources: tuple[Source, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mixture(sources)


def test_bad_sources_are_refused(scenes_root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="weight of source a is -1"):
        Source("a", -1.0)
    with pytest.raises(UserError, match="begin of a pause is -1"):
        Pause(-1, 3)
    with pytest.raises(UserError, match="use letters, digits"):
        _data({"a/b": Source(str(scenes_root))})
    with pytest.raises(UserError, match="the other to null"):
        ShardDataModule(str(scenes_root), 8, 32, 16, 400, sources={"a": Source(str(scenes_root))})
    with pytest.raises(UserError, match="sources names 0 sets"):
        _data({"a": None})
    with pytest.raises(UserError, match=f"there is no set of shards in {tmp_path}"):
        _data({"a": Source(str(scenes_root)), "b": Source(str(tmp_path))}).prepare_data()


def test_joined_by_hand() -> None:
    def images(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1)

    def texts(*values: int) -> torch.Tensor:
        return torch.tensor(values).view(-1, 1)

    found = join_batches(
        {
            0: Batch(None, texts(1, 2), texts(1, 1) > 0, ("t1", "t2")),
            2: Batch(images(3), None, None, ("i3",)),
            3: Batch(images(4, 5), texts(4, 5), texts(1, 1) > 0, ("p4", "p5"), second_images_BRYX=images(6, 7)),
        },
        ["texts", "none", "images", "pairs"],
    )
    assert found.images_BRYX is not None and found.images_BRYX.flatten().tolist() == [4, 5, 3]
    assert found.text_BL is not None and found.text_BL.flatten().tolist() == [4, 5, 1, 2]
    assert (found.keys, found.pairs) == (("p4", "p5", "i3", "t1", "t2"), 2)
    assert found.sources == ("pairs", "pairs", "images", "texts", "texts")
    # the first four: both pairs, the image, one text
    first = found.first(4)
    assert first.images_BRYX is not None and first.images_BRYX.flatten().tolist() == [4, 5, 3]
    assert first.text_BL is not None and first.text_BL.flatten().tolist() == [4, 5, 1]
    assert (first.keys, first.pairs) == (("p4", "p5", "i3", "t1"), 2)
    assert found.first(1).keys == ("p4",) and found.first(1).pairs == 1
    assert found.second_images_BRYX is not None and found.second_images_BRYX.flatten().tolist() == [6, 7, 0]
    # some of each kind, and those of two sources
    some = found.select([1, 2, 4])
    assert some.images_BRYX is not None and some.images_BRYX.flatten().tolist() == [5, 3]
    assert some.text_BL is not None and some.text_BL.flatten().tolist() == [5, 2]
    assert some.second_images_BRYX is not None and some.second_images_BRYX.flatten().tolist() == [7, 0]
    assert (some.keys, some.pairs, some.sources) == (("p5", "i3", "t2"), 1, ("pairs", "images", "texts"))
    texts_and_images = found.of_sources(("images", "texts"))
    assert (texts_and_images.keys, texts_and_images.pairs) == (("i3", "t1", "t2"), 0)
    assert found.of_sources(("texts",)).images_BRYX is None and found.of_sources(()).num_samples == 0


def test_batches_follow_the_weights(scenes_root: Path, drawings_root: Path) -> None:
    data = _data(_three(scenes_root, drawings_root))
    loader = data.train_dataloader()
    num_texts, num_pairs, num_images = (opened.manifest.num_samples("train") for opened in data.sets.values())
    assert (num_texts, num_images) == (num_texts, num_texts)
    batches = list(loader)
    # an epoch of the mixture has as many samples as its sources together
    assert len(batches) == len(loader) == (2 * num_texts + num_pairs) // 10
    for batch in batches:
        assert [batch.sources.count(name) for name in data.sources] == [
            2,
            5,
            3,
        ] and batch.pairs == 5  # 10 x (0.2, 0.5, 0.3)
        assert batch.images_BRYX is not None and batch.images_BRYX.shape == (8, 3, 32, 32)
        assert batch.text_BL is not None and batch.text_BL.shape == (7, 16)
    assert loader.samples == [2 * len(batches), 5 * len(batches), 3 * len(batches)]
    assert loader.source_epochs == pytest.approx(
        (2 * len(batches) / num_texts, 5 * len(batches) / num_pairs, 3 * len(batches) / num_images)
    )


def test_sources_run_on_over_the_ends_of_epochs(scenes_root: Path, drawings_root: Path) -> None:
    data = _data(_three(scenes_root, drawings_root), num_streams=2, batch_size=20)
    loader = data.train_dataloader()
    length = data.sets["images"].manifest.num_samples("train") // 2  # of one stream
    # 6 images a batch, in turns from two streams: the first 3 batches of each stream are 18 samples
    seen: list[list[str]] = [[], []]
    for number, batch in enumerate(islice(_on_and_on(loader), 24)):
        seen[number % 2 if len(loader) % 2 == 0 else number % len(loader) % 2] += batch.keys[10:16]
    for stream in seen:
        laps = [stream[start : start + length] for start in range(0, len(stream), length)]
        whole = [lap for lap in laps if len(lap) == length]
        assert len(whole) > 1, "the source should begin anew in this test"
        assert all(len(set(lap)) == length for lap in whole), "no sample twice before all have come"
        assert whole[0] != whole[1]


def _on_and_on(loader: ShardLoader) -> Iterator[Batch]:
    while True:
        yield from loader


@pytest.fixture(scope="module", params=["alone", "mixed"])
def uninterrupted(
    request: pytest.FixtureRequest, scenes_root: Path, drawings_root: Path
) -> tuple[dict[str, Source | None], list[str]]:
    """Sources, and the first 1350 keys of a run on them."""
    mixed = request.param == "mixed"
    sources = _three(scenes_root, drawings_root) if mixed else {"scenes": Source(str(scenes_root))}
    return sources, _keys(_data(sources), 135)


def _keys(data: ShardDataModule, num_batches: int) -> list[str]:
    return [key for batch in islice(_on_and_on(data.train_dataloader()), num_batches) for key in batch.keys]


@pytest.mark.parametrize(("num_workers", "later"), [(0, 2), pytest.param(1, 1, marks=pytest.mark.slow), (2, 0)])
def test_the_next_thousand_keys_after_a_resume(
    uninterrupted: tuple[dict[str, Source | None], list[str]], num_workers: int, later: int
) -> None:
    sources, expected = uninterrupted
    interrupted = _data(sources, num_workers=num_workers)
    # 35 batches: in the second or third epoch, in the middle of shards
    assert _keys(interrupted, 35) == expected[:350]
    state = interrupted.state_dict()
    for workers, num_batches in ((0, 100), (later, 3)):  # workers take a second to start in each of 8 epochs
        resumed = _data(sources, num_workers=workers)
        resumed.load_state_dict(state)
        assert _keys(resumed, num_batches) == expected[350 : 350 + 10 * num_batches]


def test_validation_reads_pairs_once_with_any_weights(scenes_root: Path, drawings_root: Path) -> None:
    data = _data(_three(scenes_root, drawings_root))
    seen = Counter(key for batch in data.val_dataloader() for key in batch.keys)
    assert set(seen.values()) == {1}
    assert len(seen) == data.sets["pairs"].manifest.num_samples("val")
    # without pairs, every source once
    alone = _data({name: source for name, source in _three(scenes_root, drawings_root).items() if name != "pairs"})
    counted = sum(batch.num_samples for batch in alone.val_dataloader())
    assert counted == 2 * alone.sets["texts"].manifest.num_samples("val")


def test_one_tokenizer_for_all_and_a_digest_of_all(scenes_root: Path, drawings_root: Path) -> None:
    sources = _three(scenes_root, drawings_root)
    data = _data(sources)
    assert data.tokenizer.vocab_size == data.sets["texts"].manifest.tokenizer.vocab_size
    assert data.manifest.name == "scenes+scenes+scenes"
    other = _data({**sources, "images": None})
    assert len(data.manifest_digest) == 64 and data.manifest_digest != other.manifest_digest


def test_a_resume_with_other_sources_is_refused_but_weights_may_change(scenes_root: Path, drawings_root: Path) -> None:
    sources = _three(scenes_root, drawings_root)
    data = _data(sources)
    loader = data.train_dataloader()
    next(iter(loader))
    with pytest.raises(UserError, match="manifest_digest was"):
        _data({**sources, "images": None}).train_dataloader().load_state_dict(loader.state_dict())
    changed = _data({**sources, "pairs": Source(str(scenes_root), 0.0)}).train_dataloader()
    changed.load_state_dict(loader.state_dict())
    assert [next(iter(changed)).sources.count(name) for name in sources] == [4, 0, 6]  # 0.2 : 0.3


def test_a_source_too_small_for_ranks_and_streams_is_refused(scenes_root: Path, drawings_root: Path) -> None:
    with pytest.raises(UserError, match=r"1 ranks x 100 streams; lower data\.num_streams"):
        _data(_three(scenes_root, drawings_root), num_streams=100).train_dataloader()
    with pytest.raises(UserError, match=r"does not divide data\.num_streams 4: give 0, 1, 2, 4 workers"):
        _data(_three(scenes_root, drawings_root), num_workers=3)


def test_a_modality_that_a_set_lacks_is_refused(scenes_copy: Path) -> None:
    text_only = replace(read_manifest(scenes_copy), members=("json", "txt"))
    text_only.write(scenes_copy)
    batch = next(iter(_data({"a": Source(str(scenes_copy))}).train_dataloader()))
    assert batch.images_BRYX is None and batch.pairs == 0 and batch.text_BL is not None
    with pytest.raises(UserError, match="has modality 'image', but its samples have no image: they have json, txt"):
        _data({"a": Source(str(scenes_copy), modality="image")}).prepare_data()
