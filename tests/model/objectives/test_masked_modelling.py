"""Masked data modelling: what is hidden, what is predicted, what it costs."""

import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.model.layers import initialise
from lightning_moevlm.model.layers.embeddings import patchify
from lightning_moevlm.model.objectives import Draws, MaskedModelling, PixelTargets, VQCheckpointTargets
from lightning_moevlm.model.objectives.masked_modelling import MaskRatios, TermWeights, mask_patches, mask_text
from lightning_moevlm.model.objectives.targets.image_targets import cross_entropy, standardise
from lightning_moevlm.training import VisionLanguageModule
from tests.small_model import pair_batch, small_vl_moe


def noise(num_samples: int, num: int, seed: int = 0) -> torch.Tensor:
    return Draws(seed).uniform("text", [str(sample) for sample in range(num_samples)], num)


def test_only_words_are_hidden_and_in_the_asked_share() -> None:
    batch = pair_batch(64)
    masked = mask_text(batch.text_BL, batch.text_mask_BL, 0.4, noise(64, 8))
    assert masked.hidden_BL.sum(dim=1).tolist() == [2] * 64  # 40 % of 5 words
    assert not bool(masked.hidden_BL[:, [0, 6, 7]].any())  # [BOS], [EOS], padding
    assert bool((masked.input_BL[masked.hidden_BL] == 1).all())
    assert torch.equal(masked.input_BL[~masked.hidden_BL], batch.text_BL[~masked.hidden_BL])


def test_at_least_one_word_is_hidden() -> None:
    batch = pair_batch(8)
    masked = mask_text(batch.text_BL, batch.text_mask_BL, 0.01, noise(8, 8))
    assert masked.hidden_BL.sum(dim=1).tolist() == [1] * 8


def test_text_without_words_hides_nothing_and_costs_nothing() -> None:
    text = torch.tensor([[2, 3, 0]])
    masked = mask_text(text, text != 0, 0.5, noise(1, 3))
    assert not bool(masked.hidden_BL.any())
    assert float(cross_entropy(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)).mean) == 0.0


def test_patches_are_hidden_in_the_asked_share_and_at_random() -> None:
    hidden = mask_patches(noise(200, 16), 0.4)
    assert hidden.sum(dim=1).tolist() == [6] * 200
    assert bool((hidden.float().mean(dim=0) > 0.25).all())


def test_masks_repeat_with_the_seed() -> None:
    batch = pair_batch()
    one, again, other = (mask_text(batch.text_BL, batch.text_mask_BL, 0.4, noise(4, 8, seed)) for seed in (1, 1, 2))
    assert torch.equal(one.hidden_BL, again.hidden_BL) and not torch.equal(one.hidden_BL, other.hidden_BL)


def objective(**options: object) -> tuple[MaskedModelling, object]:
    backbone = small_vl_moe()
    head = MaskedModelling(backbone.spec, **options)
    initialise(head, seed=0)
    return head, backbone


def test_untrained_terms_are_those_of_guessing() -> None:
    head, backbone = objective()
    output = head(backbone, pair_batch(16), Draws(0))
    assert set(output.terms) == {"text", "image", "pair_text", "pair_image"}
    uniform = float(torch.tensor(300.0).log())
    assert float(output.terms["text"].raw) == pytest.approx(uniform, rel=0.02)
    assert float(output.terms["pair_text"].raw) == pytest.approx(uniform, rel=0.02)
    assert float(output.terms["image"].raw) == pytest.approx(1.0, rel=0.02)  # unit variance per patch
    # 4 samples x (8 text + 4 patches + 12 of the pair)
    assert output.num_tokens == 16 * (8 + 4 + 12)
    assert {plan.source for plan in output.plans} == {"text", "image", "pair"}


def test_a_null_weight_leaves_term_and_pass_out() -> None:
    head, backbone = objective(weights=TermWeights(text=None, pair_text=None, pair_image=None))
    output = head(backbone, pair_batch(), Draws(0))
    assert list(output.terms) == ["image"] and {plan.source for plan in output.plans} == {"image"}


def test_sources_of_one_modality() -> None:
    head, backbone = objective()
    batch = pair_batch()
    assert list(head(backbone, batch._replace(images_BRYX=None), Draws(0)).terms) == ["text"]
    assert list(head(backbone, batch._replace(text_BL=None, text_mask_BL=None), Draws(0)).terms) == ["image"]


def test_a_mixed_batch_uses_pairs_as_pairs_and_everything_by_modality() -> None:
    # rows: 2 pairs, 1 image alone, 1 text alone
    whole = pair_batch(4)
    images, text, text_mask = whole.images_BRYX[:3], whole.text_BL[[0, 1, 3]], whole.text_mask_BL[[0, 1, 3]]
    mixed = Batch(images, text, text_mask, ("a", "b", "c", "d"), num_pairs=2)
    parts = {
        ("pair_text", "pair_image"): Batch(images[:2], text[:2], text_mask[:2], ("a", "b")),
        ("image",): Batch(images, None, None, ("a", "b", "c")),
        ("text",): Batch(None, text, text_mask, ("a", "b", "d")),
    }
    for terms, part in parts.items():
        weights = TermWeights(**{name: 1.0 if name in terms else None for name in vars(TermWeights())})
        head, backbone = objective(weights=weights)
        found, alone = (head(backbone, batch, Draws(0)) for batch in (mixed, part))
        assert found.terms.keys() == alone.terms.keys() == set(terms)
        for name in terms:
            assert torch.equal(found.terms[name].raw, alone.terms[name].raw)
    head, backbone = objective()
    assert head(backbone, mixed, Draws(0)).terms.keys() == {"text", "image", "pair_text", "pair_image"}
    unpaired = head(backbone, mixed._replace(num_pairs=0), Draws(0))
    assert unpaired.terms.keys() == {"text", "image"}


def test_features_of_a_mixed_batch_are_pooled_by_what_there_is() -> None:
    module = VisionLanguageModule(small_vl_moe()).eval()
    whole = pair_batch(3)
    mixed = whole._replace(text_BL=whole.text_BL[:2], text_mask_BL=whole.text_mask_BL[:2], num_pairs=2)
    with torch.no_grad():
        features = module.predict_step(mixed, 0)
    assert {name: len(values) for name, values in features.items()} == {"image": 3, "text": 2, "pair": 2}


def test_a_batch_that_no_term_can_use_is_refused() -> None:
    head, backbone = objective(weights=TermWeights(image=None, pair_text=None, pair_image=None))
    with pytest.raises(UserError, match="no modality that a weighted term"):
        head(backbone, pair_batch()._replace(text_BL=None, text_mask_BL=None), Draws(0))


def test_all_null_weights_are_refused() -> None:
    with pytest.raises(UserError, match="every weight"):
        objective(weights=TermWeights(None, None, None, None))


def test_ratios_outside_the_open_interval_are_refused() -> None:
    with pytest.raises(UserError, match=r"mask ratio text is 1\.0"):
        MaskRatios(text=1.0)


def test_pixel_targets_are_standardised_by_hand() -> None:
    # values 0, 0, 4, 4: mean 2, deviation 2
    torch.testing.assert_close(standardise(torch.tensor([0.0, 0, 4, 4])), torch.tensor([-1.0, -1, 1, 1]))
    flat = PixelTargets(small_vl_moe().spec)(torch.full((1, 3, 16, 16), 9, dtype=torch.uint8))
    assert torch.equal(flat, torch.zeros(1, 4, 192))


class BrightnessCodes(torch.nn.Module):
    """A visual tokeniser in one line: the code of an 8 px patch is its mean brightness in 10 steps."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled = torch.nn.functional.avg_pool2d(images.mean(dim=1, keepdim=True), 8)
        return (pooled.flatten(1) * 9.999).to(torch.int64)


@pytest.fixture(scope="session")
def vq_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vq") / "encoder.pt2"
    batch = torch.export.Dim("batch")
    images = torch.zeros(2, 3, 16, 16)
    torch.export.save(torch.export.export(BrightnessCodes(), (images,), dynamic_shapes=({0: batch},)), path)
    return path


def test_codes_of_a_users_checkpoint_are_targets(vq_checkpoint: Path) -> None:
    head, backbone = objective(image_targets=lambda spec: VQCheckpointTargets(spec, str(vq_checkpoint), num_codes=10))
    batch = pair_batch(16)
    assert torch.equal(head.image_targets(batch.images_BRYX), BrightnessCodes()(batch.images_BRYX.float() / 255))
    output = head(backbone, batch, Draws(0))
    assert float(output.terms["image"].raw) == pytest.approx(float(torch.tensor(10.0).log()), rel=0.05)
    assert head.num_classes["image"] == 10 and "image" in output.predictions


class CodesWithWeights(torch.nn.Module):
    """A tokeniser with parameters: the nearest of ten random directions."""

    def __init__(self) -> None:
        super().__init__()
        self.directions = torch.nn.Parameter(torch.randn(10, 192, generator=torch.Generator().manual_seed(0)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (patchify(images, 8) @ self.directions.t()).argmax(dim=-1)


def test_weights_of_a_users_checkpoint_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "encoder.pt2"
    encoder, images = CodesWithWeights(), pair_batch(16).images_BRYX
    shapes = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(encoder, (torch.rand(2, 3, 16, 16),), dynamic_shapes=shapes), path)
    module = VisionLanguageModule(
        small_vl_moe(),
        lambda spec: MaskedModelling(spec, lambda spec: VQCheckpointTargets(spec, str(path), num_codes=10)),
    )
    assert torch.equal(module.objective.image_targets(images), encoder(images.float() / 255))
    optimizer = module.build_optimizer()
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert not any(id(parameter) in trained for parameter in module.objective.image_targets.parameters())


def test_a_checkpoint_that_could_run_code_is_refused(vq_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "touched"
    payload = pickle.dumps(Exploit(str(target)))
    evil = tmp_path / "evil.pt2"
    with zipfile.ZipFile(vq_checkpoint) as source, zipfile.ZipFile(evil, "w") as copy:
        members = [member for member in source.namelist() if member.endswith(".pt")]
        assert members
        for member in source.namelist():
            copy.writestr(member, payload if member in members else source.read(member))
    with pytest.raises(UserError, match="could run code"):
        VQCheckpointTargets(small_vl_moe().spec, str(evil), num_codes=10)
    assert not target.exists()


class Exploit:
    """Touches a file when unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.pt2", None, "missing.pt2 does not exist: save the encoder"),
        ("text.pt2", b"not an archive", "is not an exported program"),
    ],
)
def test_unusable_checkpoints_are_explained(
    tmp_path: Path, name: str, content: bytes | None, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        VQCheckpointTargets(small_vl_moe().spec, str(path), num_codes=10)
    assert not caplog.records  # torch would log a traceback beside the one line


def test_a_checkpoint_with_more_codes_than_said_is_explained(vq_checkpoint: Path) -> None:
    targets = VQCheckpointTargets(small_vl_moe().spec, str(vq_checkpoint), num_codes=3)
    with pytest.raises(UserError, match="codes 9 to 9 with num_codes 3: allowed are 0 to 2"):
        targets(torch.full((2, 3, 16, 16), 255, dtype=torch.uint8))


def test_masks_do_not_depend_on_the_default_dtype() -> None:
    # bf16-true sets torch's default dtype to bf16: 76 words x 0.151 = 11.476 is 11, in steps of 1/16 it is 11.5, which
    # is 12
    text_BL = torch.full((1, 76), 17)
    masks = []
    for default in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            masks.append(mask_text(text_BL, text_BL > 0, 0.151, noise(1, 76)).hidden_BL)
        finally:
            torch.set_default_dtype(torch.float32)
    assert int(masks[0].sum()) == 11
    assert torch.equal(*masks)
