"""Next tokens: what is predicted from what, the loss by hand, and what is refused."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.special_tokens import EOS, PAD
from lightning_moevlm.model.generation import generate
from lightning_moevlm.model.objectives import Draws, NextToken
from lightning_moevlm.model.routers import ExpertChoiceRouter
from lightning_moevlm.training import VisionLanguageModule
from tests.small_model import cut, pair_batch, small_decoder, small_limoe, small_vl_moe, uneven_batch
from tests.training.test_evaluation import measured


def mixed(num_pairs: int = 3, num_texts: int = 2) -> Batch:
    """Pairs, then texts alone."""
    batch = uneven_batch(num_pairs + num_texts)
    assert batch.images_BRYX is not None
    return batch._replace(images_BRYX=batch.images_BRYX[:num_pairs], num_pairs=num_pairs)


@pytest.mark.parametrize("build", [small_limoe, small_vl_moe, small_decoder])
def test_the_loss_by_hand(build: type) -> None:
    backbone, batch = build().eval(), pair_batch(3)
    objective = NextToken(backbone.spec).eval()
    output = objective(backbone, batch, Draws(0))
    features = backbone(*batch[:3], causal=True).tokens_BSD[:, 4:]  # after 4 patches
    losses = []
    for row in range(3):
        for position in range(6):  # [BOS] and 5 words predict 5 words and [EOS]; then comes padding
            hidden = objective.text_head(features[row, position])
            logits = F.linear(hidden, backbone.text_embedding_VD, objective.text_head.bias_V)
            losses.append(F.cross_entropy(logits, batch.text_BL[row, position + 1]))
    assert output.terms["caption"].num_predictions == 18
    assert float(output.terms["caption"].raw) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert "text" not in output.terms


@pytest.mark.parametrize("build", [small_limoe, small_vl_moe, small_decoder])
def test_a_token_is_predicted_from_its_image_and_the_tokens_before_it(build: type) -> None:
    backbone, batch = build().eval(), pair_batch(2)
    changed = batch.text_BL.clone()
    changed[:, 4] = 299
    with torch.no_grad():
        plain = backbone(*batch[:3], causal=True).tokens_BSD
        later = backbone(batch.images_BRYX, changed, batch.text_mask_BL, causal=True).tokens_BSD
        other = backbone(255 - batch.images_BRYX, batch.text_BL, batch.text_mask_BL, causal=True).tokens_BSD
    assert torch.allclose(plain[:, : 4 + 4], later[:, : 4 + 4], atol=1e-6)
    assert not torch.allclose(plain[:, 8:], later[:, 8:], atol=1e-3)
    assert not torch.allclose(plain[:, 4:8], other[:, 4:8], atol=1e-3)


def test_pairs_and_texts_alone_are_terms_of_their_own() -> None:
    objective = NextToken(small_limoe().spec)
    batch = mixed(3, 2)  # texts of 1, 2, 3 and 4, 5 words, each with its [EOS]
    terms = objective(small_limoe(), batch, Draws(0)).terms
    assert {name: term.num_predictions for name, term in terms.items()} == {"caption": 2 + 3 + 4, "text": 5 + 6}
    size = objective.size(batch)
    assert {name: int(number) for name, number in size.predictions.items()} == {"caption": 9, "text": 11}
    assert size.passes["pair"].tokens_A.tolist() == [3 * 4, 3 + 4 + 5]
    assert size.passes["text"].tokens_A.tolist() == [0, 6 + 7]


def asked(num_samples: int = 4) -> Batch:
    """Questions of 2 words with answers of 1: [BOS] q q [EOS] a [EOS], two positions of padding."""
    batch = pair_batch(num_samples)
    text_BL = batch.text_BL.clone()
    text_BL[:, 3], text_BL[:, 5], text_BL[:, 6:] = EOS, EOS, PAD
    return batch._replace(text_BL=text_BL, text_mask_BL=text_BL != PAD)


def test_answers_alone_are_predicted_by_hand() -> None:
    backbone, batch = small_decoder().eval(), asked(2)
    objective = NextToken(backbone.spec, answers_only=True).eval()
    output = objective(backbone, batch, Draws(0))
    features = backbone(*batch[:3], causal=True).tokens_BSD[:, 4:]
    losses = []
    for row in range(2):
        for position in (3, 4):  # the question's [EOS] predicts the answer, the answer its own [EOS]
            logits = objective.logits(backbone, features[row, position : position + 1])[0]
            losses.append(F.cross_entropy(logits, batch.text_BL[row, position + 1]))
    term = output.terms["caption"]
    assert term.num_predictions == int(objective.size(batch).predictions["caption"]) == 4
    assert float(term.raw) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert objective.prompts(batch.text_BL, batch.text_mask_BL)[0].tolist() == [
        [*row[:4], PAD, PAD, PAD, PAD] for row in batch.text_BL.tolist()
    ]


def test_answers_that_were_learnt_are_generated_after_their_questions() -> None:
    module, batch = (
        VisionLanguageModule(small_decoder(num_blocks=2, sees_sparsely=False), partial(NextToken, answers_only=True)),
        asked(3),
    )
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3)
    for step in range(40):
        _, report = module.train().compute_losses(batch, step)
        optimizer.zero_grad()
        report.total_loss.backward()
        optimizer.step()
    backbone, objective = module.backbone.eval(), module.objective
    assert isinstance(objective, NextToken)
    prompts = objective.prompts(batch.text_BL, batch.text_mask_BL)
    found = generate(backbone, partial(objective.logits, backbone), batch.images_BRYX, *prompts)
    assert torch.equal(found.text_BN[:, :2], batch.text_BL[:, 4:6])


def test_texts_without_an_answer_are_refused() -> None:
    objective = NextToken(small_decoder().spec, answers_only=True)
    with pytest.raises(UserError, match=r"set data\.append_answer to true"):
        objective(small_decoder(), pair_batch(2), Draws(0))


def test_sizes_name_the_same_terms_for_every_batch() -> None:
    objective = NextToken(small_limoe().spec)
    sizes = [objective.size(batch) for batch in (mixed(), pair_batch(2), mixed(0, 2)._replace(images_BRYX=None))]
    assert len({(tuple(size.predictions), tuple(size.passes)) for size in sizes}) == 1


def test_evaluation_does_not_depend_on_the_batch_size() -> None:
    module = VisionLanguageModule(small_limoe(), NextToken, init_std=0.3)
    whole = uneven_batch(25)
    expected = measured(module, [whole])
    assert {
        "val_loss/caption",
        "val/accuracy_caption",
        "val/majority_caption",
        "val/perplexity/caption",
    } <= expected.keys()
    assert measured(module, cut(whole, 4)) == pytest.approx(expected, rel=2e-5)


def test_routers_that_look_ahead_are_refused_when_the_model_is_built() -> None:
    backbone = small_limoe(router=partial(ExpertChoiceRouter))
    with pytest.raises(UserError, match="a causal model cannot use ExpertChoiceRouter"):
        VisionLanguageModule(backbone, NextToken)


def test_a_batch_without_a_weighted_term_is_refused() -> None:
    objective = NextToken(small_limoe().spec, text_weight=None)
    with pytest.raises(UserError, match="no text that a weighted term of NextToken can use"):
        objective(small_limoe(), mixed(0, 2)._replace(images_BRYX=None), Draws(0))
    with pytest.raises(UserError, match="set caption_weight or text_weight"):
        NextToken(small_limoe().spec, None, None)
