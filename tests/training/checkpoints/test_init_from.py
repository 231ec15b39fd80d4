"""Training that starts from another run's weights: what is taken, what is refused, and dense models as experts."""

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.backbones import LIMoE
from lightning_moevlm.model.objectives import Contrastive, MaskedModelling, NextToken
from lightning_moevlm.model.routers import TopKRouter
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.checkpoints.init_from import (
    InitFrom,
    Upcycle,
    load_initial_weights,
    measure_upcycling,
)
from tests.small_model import pair_batch, small_decoder, small_limoe, small_moe

RENORMALISED = partial(TopKRouter, top_k=2, renormalise=True)


def limoe(num_experts: int = 4, hidden_dim: int = 48, **options: object) -> LIMoE:
    """A LIMoE whose blocks 1 and 3 are sparse; with one expert they are dense but for the name."""
    router = options.pop("router", RENORMALISED if num_experts > 1 else TopKRouter)
    moe = small_moe(num_experts=num_experts, router=router)  # type: ignore[arg-type]
    moe.keywords["experts"].keywords["hidden_dim"] = hidden_dim
    return LIMoE(
        dim=32, num_heads=2, num_blocks=4, hidden_dim=64, image_size=16, patch_size=8, vocab_size=300, max_text_len=8,
        moe=moe, **options,  # type: ignore[arg-type]
    )  # fmt: skip


def saved(module: VisionLanguageModule, folder: Path) -> str:
    """A checkpoint after two steps."""
    trainer = Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader([pair_batch()] * 2, batch_size=None))  # type: ignore[arg-type]
    path = folder / "other.ckpt"
    trainer.save_checkpoint(path)
    return str(path)


@pytest.fixture
def dense(tmp_path: Path) -> tuple[VisionLanguageModule, str]:
    module = VisionLanguageModule(limoe(1), seed=5, init_std=0.1)
    return module, saved(module, tmp_path)


def test_a_like_model_starts_where_the_other_ended(tmp_path: Path) -> None:
    other = VisionLanguageModule(small_limoe(), seed=5)
    path = saved(other, tmp_path)
    module = VisionLanguageModule(small_limoe(), partial(Contrastive))
    loaded = load_initial_weights(module, InitFrom(path))
    for name, value in module.state_dict().items():
        if name.startswith("backbone."):
            assert torch.equal(value, other.state_dict()[name]), name
    assert {name.split(".")[1] for name in loaded.new} == {"image_projection", "text_projection", "log_scale"}
    assert all(name.startswith("objective.") for name in loaded.left)
    assert "backbone.blocks" in loaded.describe()


def test_parts_alone_are_taken(tmp_path: Path) -> None:
    other = VisionLanguageModule(small_limoe(), seed=5)
    path = saved(other, tmp_path)
    module = VisionLanguageModule(small_limoe())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    loaded = load_initial_weights(module, InitFrom(path, ("backbone.patches", "backbone.blocks.0")))
    for name, value in module.state_dict().items():
        is_taken = name.startswith(("backbone.patches.", "backbone.blocks.0."))
        assert torch.equal(value, (other.state_dict() if is_taken else before)[name]), name
        assert (name in loaded.taken) == is_taken


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"parts": ("backbone.patch",)}, r"has no backbone.patch; did you mean 'backbone.patch"),
        ({"parts": ("backbone.blocks.1.ffn.router",), "checkpoint": "{dense}"}, None),
        ({"checkpoint": "missing.ckpt"}, "no checkpoint at missing.ckpt"),
    ],
)
def test_what_cannot_be_taken_is_refused(
    dense: tuple[VisionLanguageModule, str], options: dict, match: str | None
) -> None:
    options = {"checkpoint": dense[1]} | {key: value for key, value in options.items() if value != "{dense}"}
    module = VisionLanguageModule(limoe(4))
    with pytest.raises(UserError, match=match):
        load_initial_weights(module, InitFrom(**options))


def test_another_width_is_refused_before_anything_changes(dense: tuple[VisionLanguageModule, str]) -> None:
    module = VisionLanguageModule(limoe(4, hidden_dim=40))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(UserError, match="give experts of equal hidden_dim"):
        load_initial_weights(module, InitFrom(dense[1], upcycle=Upcycle()))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_an_upcycled_mixture_computes_what_the_dense_model_did(dense: tuple[VisionLanguageModule, str]) -> None:
    other, path = dense
    module = VisionLanguageModule(limoe(4))
    loaded = load_initial_weights(module, InitFrom(path, ("backbone",), Upcycle()))
    assert len(loaded.upcycled) == 4  # up and down of two layers
    assert max(measure_upcycling(module, loaded).values()) < 1e-5
    batch = pair_batch(3)
    with torch.no_grad():
        one, two = (each.backbone.eval()(*batch[:3]).tokens_BSD for each in (other, module))
    assert torch.allclose(one, two, atol=1e-5)


def test_a_dense_feed_forward_becomes_experts(tmp_path: Path) -> None:
    twin = VisionLanguageModule(limoe(4, is_sparse=False), seed=5, init_std=0.1)
    width = twin.backbone.blocks[1].ffn.up.out_features  # type: ignore[union-attr]
    path = saved(twin, tmp_path)
    module = VisionLanguageModule(limoe(4, hidden_dim=width))
    loaded = load_initial_weights(module, InitFrom(path, upcycle=Upcycle()))
    assert max(measure_upcycling(module, loaded).values()) < 1e-5
    up_DF = twin.backbone.blocks[1].ffn.up.weight.T  # type: ignore[union-attr]
    for expert in module.backbone.blocks[1].ffn.experts.up_EDF:  # type: ignore[union-attr]
        assert torch.equal(expert, up_DF)


@pytest.mark.parametrize("is_gated", [False, True])
def test_experts_of_every_part_of_a_decoder_start_from_the_dense_one(is_gated: bool, tmp_path: Path) -> None:
    dense = small_decoder(moe_every=None, sees_sparsely=False, is_gated=is_gated)
    other = VisionLanguageModule(dense, NextToken, seed=5, init_std=0.1)
    module = VisionLanguageModule(small_decoder(router=RENORMALISED, is_gated=is_gated), NextToken)
    loaded = load_initial_weights(module, InitFrom(saved(other, tmp_path), upcycle=Upcycle()))
    found = measure_upcycling(module, loaded)
    assert found.keys() == {
        f"backbone.{layer}" for layer in ("vision.blocks.1.ffn", "connector.ffn", "blocks.1.ffn", "blocks.3.ffn")
    }
    assert max(found.values()) < 1e-5 and all(".router." in name for name in loaded.new) and not loaded.left
    with torch.no_grad():
        one, two = (each.backbone.eval()(*pair_batch(3)[:3]).tokens_BSD for each in (other, module))
    assert torch.allclose(one[:, :-1], two[:, :-1], atol=1e-5)  # experts leave padding alone


def test_drop_upcycling_starts_a_share_of_the_units_anew(dense: tuple[VisionLanguageModule, str]) -> None:
    other, path = dense
    module = VisionLanguageModule(limoe(4))
    load_initial_weights(module, InitFrom(path, ("backbone",), Upcycle(reinitialised=0.5)))
    up_DF, down_FD = (stack[0] for stack in other.backbone.blocks[1].ffn.experts.stacks())  # type: ignore[union-attr]
    new_units = set()
    experts = module.backbone.blocks[1].ffn.experts  # type: ignore[union-attr]
    for up, down in zip(*experts.stacks(), strict=True):
        changed_up = (up != up_DF).all(dim=0)
        assert torch.equal(changed_up, (down != down_FD).all(dim=1))  # the same units of both matrices
        assert torch.equal(changed_up, (up != up_DF).any(dim=0)) and int(changed_up.sum()) == 24
        assert float(up[:, changed_up].std()) == pytest.approx(float(up_DF.std()), rel=0.3)
        new_units.add(tuple(changed_up.nonzero().flatten().tolist()))
    assert len(new_units) == 4  # each expert its own


def test_noise_tells_experts_apart(dense: tuple[VisionLanguageModule, str]) -> None:
    other, path = dense
    module = VisionLanguageModule(limoe(4))
    load_initial_weights(module, InitFrom(path, ("backbone",), Upcycle(noise=0.1)))
    up_EDF, start_EDF = (each.backbone.blocks[1].ffn.experts.up_EDF for each in (module, other))  # type: ignore[union-attr]
    assert float((up_EDF - start_EDF).std() / start_EDF.std()) == pytest.approx(0.1, rel=0.1)
    assert not torch.equal(up_EDF[0], up_EDF[1])


def test_training_begins_with_them_and_says_so(
    dense: tuple[VisionLanguageModule, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other, path = dense
    module = VisionLanguageModule(limoe(4), MaskedModelling, init_from=InitFrom(path, ("backbone",), Upcycle()))
    trainer = Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trainer.fit(module, DataLoader([pair_batch()], batch_size=None))  # type: ignore[arg-type]
    assert "2 upcycled mixtures differ from their dense start by at most" in caplog.text
    moved = (module.state_dict()["backbone.text.token.weight"] - other.state_dict()["backbone.text.token.weight"]).abs()
    assert 0 < float(moved.max()) < 0.01  # one step from the other's weights
