"""Log-probabilities of given answers are those that generation finds for what it says."""

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.special_tokens import EOS
from lightning_moevlm.model.dispatch import Capacity
from lightning_moevlm.model.generation import likelihood, rate_answers
from tests.model.test_generation import BUILDERS, model, prompts, run
from tests.small_model import default_dtype, small_limoe


@pytest.mark.parametrize("name", ["limoe", "vl_moe", "decoder"])
def test_answers_are_rated_as_they_were_generated(name: str) -> None:
    backbone, logits = model(BUILDERS[name])
    batch = prompts()
    assert batch.text_BL is not None and batch.text_mask_BL is not None
    found = run(backbone, logits, batch, max_new_tokens=4)
    said = [row[: row.index(EOS) + 1] if EOS in row else row for row in found.text_BN.tolist()]
    rated_BA = rate_answers(backbone, logits, batch.images_BRYX, batch.text_BL, batch.text_mask_BL, [*said, [7, EOS]])
    assert rated_BA.shape == (5, 6)
    torch.testing.assert_close(rated_BA[:, :5].diagonal(), found.log_prob_B)
    alone = rate_answers(backbone, logits, batch.images_BRYX[3:4], *(each[3:4] for each in batch[1:3]), [[7, EOS]])  # type: ignore[index]
    torch.testing.assert_close(rated_BA[3, 5], alone[0, 0])


def test_prompts_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, logits = model(BUILDERS["decoder"])
    batch = prompts()
    answers = [[7, EOS], [8, EOS], [9, 10, EOS], [11]]
    positions: list[int] = []
    block = backbone.blocks[0]  # type: ignore[index]
    block.register_forward_pre_hook(lambda module, args: positions.append(args[0].shape[0] * args[0].shape[1]))
    together = rate_answers(backbone, logits, *batch[:3], answers)  # type: ignore[arg-type]
    first, *more = positions
    assert sum(more) == 5 * (1 + 1 + 2 + 0)  # what is beside the first tokens, and not the ends
    assert len(more) == 1 + 2  # answers of one length go on together
    assert first > sum(more)
    monkeypatch.setattr(likelihood, "_MOST_ROWS", 1)
    torch.testing.assert_close(rate_answers(backbone, logits, *batch[:3], answers), together)  # type: ignore[arg-type]


def test_ratings_are_fp32_under_bf16_true() -> None:
    """Lightning changes the default dtype within a step; rounded ratings would be alike."""
    backbone, logits = model(BUILDERS["decoder"])
    batch = prompts()
    expected = rate_answers(backbone, logits, *batch[:3], [[7, EOS], [8, EOS]])  # type: ignore[arg-type]
    with default_dtype(torch.bfloat16):
        found = rate_answers(backbone, logits, *batch[:3], [[7, EOS], [8, EOS]])  # type: ignore[arg-type]
    assert torch.equal(found, expected) and found.dtype is torch.float32


def test_what_cannot_be_rated_is_refused() -> None:
    backbone, logits = model(BUILDERS["limoe"])
    batch = prompts()
    with pytest.raises(UserError, match=r"have 9 tokens, and data\.max_text_len is 8: set it to 9 or more"):
        rate_answers(backbone, logits, *batch[:3], [[7] * 6])
    limited = small_limoe(capacity=Capacity(eval_factor=1.0)).eval()
    with pytest.raises(UserError, match="limits its experts in evaluation"):
        rate_answers(limited, logits, *batch[:3], [[7]])
