"""A trace gives back what was routed, and needs no more memory for a larger probe."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from lightning_moevlm.atlas.causal.intervene import sparse_layers
from lightning_moevlm.atlas.labels.label import BY_NAME, Null
from lightning_moevlm.atlas.labels.label_tokens import LabelReader
from lightning_moevlm.atlas.make_atlas import make_atlas
from lightning_moevlm.atlas.probe.probe_set import ProbeSet
from lightning_moevlm.atlas.routing.route import RoutedBatch, route
from lightning_moevlm.atlas.routing.trace import Trace, TraceWriter
from lightning_moevlm.atlas.statistics.specialisation import specialise
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.text.chat import ChatOptions
from lightning_moevlm.data.write.demo.scenes import build_scenes
from lightning_moevlm.model.objectives import MaskedModelling, NextToken
from lightning_moevlm.model.routers import FixedRouter, SoftRouter, TopKRouter
from tests.atlas.observed import (
    NUM_DRAWINGS,
    NUM_EXPERTS,
    SIZES,
    examine_atlas,
    observe,
    open_data,
    small_model,
)
from tests.training.grid import FAMILIES


@pytest.fixture(scope="module")
def routed(many_scenes: Path) -> tuple[LabelReader, tuple[RoutedBatch, ...]]:
    """48 samples in two batches, routed by position."""
    model = small_model(FixedRouter)
    probe = ProbeSet(open_data(many_scenes), "train", 48)
    reader = LabelReader(model, probe.tokenizer)
    return reader, tuple(route(model, MaskedModelling(model.spec), probe, reader))


def test_a_trace_is_what_was_routed(routed: tuple[LabelReader, tuple[RoutedBatch, ...]], tmp_path: Path) -> None:
    reader, batches = routed
    with TraceWriter(tmp_path / "trace.safetensors") as writer:
        for each in batches:
            writer.add(each)
    trace = Trace(tmp_path / "trace.safetensors")
    (layer,) = trace.layers
    assert (trace.num_samples, trace.length, layer.num_experts) == (48, 16 + 32, NUM_EXPERTS)
    assert [*trace.blocks(32)] == [slice(0, 32), slice(32, 48)]
    last = batches[-1]
    rows = slice(32, 48)
    assert np.array_equal(trace.chosen(layer, rows), last.layers[0].chosen_BSE.numpy())
    assert np.array_equal(trace.seen(layer, rows), last.labels.valid_BS)
    assert np.array_equal(trace.label("image/category", rows), last.labels.codes["image/category"])
    assert np.array_equal(trace.unit(Null.IDENTITIES, rows), last.labels.units[Null.IDENTITIES])
    assert {label.name for label in reader.known()} >= {"modality", "image/position", "text/word", "text/object"}
    # every patch has an expert of its turn, padding none
    assert (trace.chosen(layer, rows)[:, :16].argmax(-1) == np.arange(16) % NUM_EXPERTS).all()
    assert (trace.chosen(layer, rows).sum(-1) == trace.seen(layer, rows)).all()


def test_a_trace_that_fails_leaves_nothing(routed: tuple[LabelReader, tuple[RoutedBatch, ...]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stop"), TraceWriter(tmp_path / "trace.safetensors") as writer:
        writer.add(routed[1][0])
        raise UserError("stop")
    assert not any(tmp_path.iterdir())


def test_memory_does_not_grow_with_the_probe(
    routed: tuple[LabelReader, tuple[RoutedBatch, ...]], tmp_path: Path
) -> None:
    reader, batches = routed
    label = BY_NAME["text/category"]

    def peak(times: int) -> int:
        file = tmp_path / f"{times}.safetensors"
        tracemalloc.start()
        with TraceWriter(file) as writer:
            for _ in range(times):
                for each in batches:
                    writer.add(each)
        trace = Trace(file)
        assert trace.num_samples == 48 * times
        assert specialise(trace, trace.layers[0], label, reader.values[label.name].names, 19, 0) is not None
        return tracemalloc.get_traced_memory()[1]

    small, large = peak(4), peak(24)
    tracemalloc.stop()
    assert large < 1.1 * small + 20_000


@pytest.mark.slow  # atlases of 700 and of 2,800 samples
@pytest.mark.timeout(3600)
def test_an_atlas_needs_little_more_memory_for_four_times_the_samples(tmp_path: Path) -> None:
    """Its tables grow with distinct words and patch codes. Of a sample removals keep scores and a key. -s prints it."""
    root = tmp_path / "scenes"
    build_scenes(root, 3600, 32, "jpg", NUM_DRAWINGS, 5, 400, SIZES["vocab_size"], force=False)
    model = small_model(TopKRouter)

    def peak(samples: int) -> float:
        tracemalloc.reset_peak()
        folder = tmp_path / str(samples)
        atlas = observe(root, model, folder, draws=19, samples=samples)
        assert examine_atlas(root, model, atlas, folder).num_samples == samples
        return tracemalloc.get_traced_memory()[1] / 2**20

    tracemalloc.start()
    peak(64)  # modules are imported
    small, large = peak(700), peak(2800)
    tracemalloc.stop()
    print(f"\n700 samples: {small:.1f} MiB, 2,800 samples: {large:.1f} MiB")
    assert (large - small) * 2**20 / 2100 < 1024  # bytes a sample


def test_soft_slots_have_shares(many_scenes: Path, tmp_path: Path) -> None:
    model = small_model(SoftRouter)
    probe = ProbeSet(open_data(many_scenes), "train", 8)
    reader = LabelReader(model, probe.tokenizer)
    (batch,) = route(model, MaskedModelling(model.spec), probe, reader)
    with TraceWriter(tmp_path / "trace.safetensors") as writer:
        writer.add(batch)
    trace = Trace(tmp_path / "trace.safetensors")
    (layer,) = trace.layers
    chosen = trace.chosen(layer, slice(0, 8))
    assert layer.is_soft and chosen == pytest.approx(batch.layers[0].chosen_BSE.numpy(), abs=1e-3)
    assert chosen.sum(-1)[batch.labels.valid_BS] == pytest.approx(1, abs=1e-2)
    found = specialise(trace, layer, BY_NAME["modality"], reader.values["modality"].names, 19, 0)
    assert found is not None and found.counts_EV.sum() == pytest.approx(batch.labels.valid_BS.sum(), rel=1e-2)


def test_a_probe_is_named_by_its_keys(many_scenes: Path) -> None:
    data = open_data(many_scenes)
    first, again, other = (ProbeSet(data, "train", 20, seed) for seed in (0, 0, 1))
    assert first.record == again.record and first.record.keys != other.record.keys
    assert first.record.name == f"train-20-seed0-{first.record.keys}"
    keys = [key for batch in first.batches(7) for key in batch.batch.keys]
    assert len(keys) == len(set(keys)) == 20
    assert [key for batch in first.batches(20) for key in batch.batch.keys] == keys
    with pytest.raises(UserError, match="samples is 0"):
        ProbeSet(data, "train", 0)
    conversations = ShardDataModule(str(many_scenes), 8, chat=ChatOptions("a_processor"), **SIZES)
    with pytest.raises(UserError, match="experts of this run cannot be labelled"):
        ProbeSet(conversations, "train", 20)


@pytest.fixture(scope="module")
def few_scenes(tmp_path_factory: pytest.TempPathFactory) -> ShardDataModule:
    """80 scenes for the models of `small_model`."""
    root = tmp_path_factory.mktemp("few") / "scenes"
    build_scenes(root, 80, 32, "jpg", 8, seed=3, samples_per_shard=20, vocab_size=300, force=False)
    return ShardDataModule(str(root), batch_size=8, image_size=16, max_text_len=8, vocab_size=300)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_atlas_shows_every_layer_of_every_family(family: str, few_scenes: ShardDataModule, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    atlas = make_atlas(model, NextToken(model.spec), ProbeSet(few_scenes, "train", 12), tmp_path, draws=19)
    assert {each.layer for each in atlas.layers} == sparse_layers(model).keys()
    counted = {label.name for label in atlas.labels}
    assert counted >= {"image/position", "text/position", "image/category", "text/word", "text/object"}
    assert all(sum(each.confidence.pairs_E) > 0 and each.results for each in atlas.of_layers)
