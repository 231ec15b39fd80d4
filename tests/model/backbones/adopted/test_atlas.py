"""The atlas of an adopted model: patches and words of its own routers, on real samples."""

from pathlib import Path

import pytest

from lightning_moevlm.atlas.make_atlas import make_atlas
from lightning_moevlm.atlas.probe.probe_set import ProbeSet
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.model.backbones import HuggingFaceModel
from lightning_moevlm.model.objectives import NextToken
from tests.model.backbones.adopted.small_hugging_face import QWEN

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'lightning-moevlm[hf]'")


def test_experts_of_an_adopted_model_are_observed(scenes_root: Path, tmp_path: Path) -> None:
    model = HuggingFaceModel(config=QWEN, image_size=16, vocab_size=400, max_text_len=24)
    spec = model.spec
    data = ShardDataModule(str(scenes_root), 8, 16, 24, 400)
    probe = ProbeSet(data, "train", 24)
    atlas = make_atlas(model, NextToken(spec), probe, tmp_path, draws=19, batch_size=8)
    assert [each.layer for each in atlas.layers] == [each.path for each in model.layers]
    assert {"modality", "image/position", "text/word"} <= {label.name for label in atlas.labels}
    for each in atlas.of_layers:
        chosen = sum(each.confidence.pairs_E)
        tokens = sum(found.num_tokens for found in each.confidence.of_modality.values())
        assert chosen == pytest.approx(tokens * model.layers[0].router.experts_per_token)
        assert each.confidence.of_modality["image"].num_tokens == 24 * spec.num_patches
        assert any(top.patches for top in each.tops) and any(top.words for top in each.tops)
        if model.layers[0].router.experts_per_token > 1:
            together = atlas.together[0, 0]
            assert together.sum() > together.diagonal().sum()
