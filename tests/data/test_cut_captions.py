"""Captions that are longer than the model's texts are cut, and runs and checks report how many."""

import io
import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from rich.console import Console

from lightning_moevlm.cli.data.commands import tabulate_card
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.format.manifest import read_manifest
from lightning_moevlm.data.format.shard_reader import RawSample, read_shard
from lightning_moevlm.data.inspect.check import check_set
from lightning_moevlm.data.read.mixture import Source
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from lightning_moevlm.data.text.texts import decode_text
from lightning_moevlm.data.write.convert.convert import ConvertOptions, SetOptions, convert
from lightning_moevlm.data.write.convert.shard_image import ImageOptions
from lightning_moevlm.data.write.convert.sources.csv_jsonl import Columns, CsvSource
from lightning_moevlm.data.write.convert.sources.sets.questions import SetQuestions
from lightning_moevlm.data.write.finish_set import Licence
from lightning_moevlm.model.backbones import VLMoE
from lightning_moevlm.model.layers import initialise
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.callbacks import Telemetry
from tests.data.sources import write_csv, write_set
from tests.small_model import small_moe
from tests.training.small_fit import Memory


def _data(root: Path, max_text_len: int, **options: int) -> ShardDataModule:
    return ShardDataModule(str(root), 8, 16, max_text_len, 400, shuffle_buffer=7, **options)


def _lengths(root: Path) -> list[int]:
    """Token ids of every training caption, with [BOS] and [EOS]."""
    data, manifest = _data(root, 16), read_manifest(root)
    samples = (s for e in manifest.splits["train"] for s in read_shard(ShardStorage(str(root)), e, frozenset({"txt"})))
    texts = [decode_text(sample.members["txt"]) for sample in samples if isinstance(sample, RawSample)]
    return [len(data.tokenizer.ids(text)) + 2 for text in texts]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_counts_them_across_a_resume(scenes_root: Path, num_workers: int) -> None:
    lengths = _lengths(scenes_root)
    limit = sorted(lengths)[len(lengths) // 2]
    expected = sum(length > limit for length in lengths)
    assert 0 < expected < len(lengths) == 120
    loader = _data(scenes_root, limit, num_workers=num_workers).train_dataloader()
    whole = [sum(loader.num_cut) for _ in loader]
    assert (loader.num_texts, loader.num_cut) == ([120], [expected])
    first = _data(scenes_root, limit).train_dataloader()
    for _, _ in zip(range(6), first, strict=False):
        pass
    rest = _data(scenes_root, limit).train_dataloader()
    rest.load_state_dict(first.state_dict())
    assert [sum(rest.num_cut) for _ in rest] == whole[6:]
    longest = _data(scenes_root, max(lengths)).train_dataloader()
    assert sum(1 for _ in longest) == 15 and longest.num_cut == [0]


def test_a_run_prints_and_logs_the_share(scenes_root: Path, caplog: pytest.LogCaptureFixture) -> None:
    limit = min(_lengths(scenes_root)) - 1
    with caplog.at_level(logging.INFO):
        assert _fit(scenes_root, limit) == [(step, 1.0) for step in (1, 2, 3)]
    (printed,) = [record.getMessage() for record in caplog.records if "captions" in record.getMessage()]
    assert printed.startswith(
        f"scenes: 100.0% of 24 captions are longer than data.max_text_len {limit} and lose their end"
    )
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert _fit(scenes_root, max(_lengths(scenes_root))) == [(step, 0.0) for step in (1, 2, 3)]
    assert not [record for record in caplog.records if "captions" in record.getMessage()]


def test_a_run_begins_with_the_share_of_each_source(
    tmp_path: Path, scenes_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    questions = tmp_path / "questions"
    write_set(SetQuestions(scenes_root, None), questions)
    lengths = _lengths(scenes_root)
    limit = sorted(lengths)[60]
    share = sum(length > limit for length in lengths) / 120

    def told(limit: int, append_answer: bool | None = None) -> dict[str, str]:
        """By source."""
        caplog.clear()
        sources = {
            "scenes": Source(str(scenes_root)),
            "questions": Source(str(questions), annotation="answers"),
            "pictures": Source(str(scenes_root), modality="image"),
        }
        data = ShardDataModule(None, 8, 16, limit, 400, sources=sources, append_answer=append_answer)
        with caplog.at_level(logging.INFO):
            data.prepare_data()
        lines = [record.getMessage() for record in caplog.records]
        return {line.partition(":")[0]: line for line in lines if "lose their end" in line}

    line = told(limit)["scenes"]
    assert line.startswith(
        f"scenes: {share:.1%} of the first 120 training texts are longer than data.max_text_len {limit}"
    )
    assert f"the longest has {max(lengths)} ids. `moevlm data check {scenes_root}`" in line
    asked = max(_lengths(questions))
    assert told(max([*lengths, asked])) == {}
    assert "questions" not in told(asked) and "questions" in told(asked, append_answer=True)  # no room for the answer


def _backbone(max_text_len: int) -> VLMoE:
    moe = small_moe(num_experts=2)
    backbone = VLMoE(
        dim=32,
        num_heads=2,
        num_blocks=3,
        num_vl_blocks=1,
        hidden_dim=64,
        image_size=16,
        patch_size=8,
        vocab_size=400,
        max_text_len=max_text_len,
        moe=moe,
    )
    initialise(backbone, 0)
    return backbone


def _fit(root: Path, max_text_len: int) -> list[tuple[int, float]]:
    memory = Memory()
    module = VisionLanguageModule(_backbone(max_text_len), optimizer=partial(torch.optim.AdamW, lr=1e-3))
    trainer = Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=memory,
        callbacks=[Telemetry()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=_data(root, max_text_len))
    return memory.points["data/cut_captions/scenes"]


def test_a_check_prints_the_share_for_every_usual_length(tmp_path: Path) -> None:
    captions = [" ".join(["word"] * (30 if number % 2 else 3)) + f" {number}" for number in range(60)]
    table = write_csv(tmp_path / "t.csv", ["caption"], [[caption] for caption in captions])
    source = CsvSource(table, None, None, Columns(None, "caption", None, None))
    convert(
        source,
        tmp_path / "set",
        Licence("CC0", "", ""),
        SetOptions(ImageOptions("jpg", None), 30, 300),
        ConvertOptions(0, 1, False),
    )
    report = check_set(ShardStorage(str(tmp_path / "set")))
    for card in report.cards:
        assert card.cut[40] == card.cut[64] == card.cut[128] == 0
    assert sum(card.cut[24] * card.num_samples for card in report.cards) == pytest.approx(30)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(tabulate_card(report, "set"))
    longest = max(card.caption_max for card in report.cards)
    printed = f"captions that are cut, by data.max_text_len: 24: 50.0%; {longest + 2} and more: none"
    assert printed in console.export_text()
