"""An audit leaves a model as it was, and its numbers are those of plans."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'lightning-moevlm[hf]'")

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.model.backbones.adopted.audit.audit import audit
from lightning_moevlm.model.backbones.adopted.audit.open_model import encode_texts, open_model
from lightning_moevlm.model.backbones.adopted.audit.records import LayerLoad, Setting
from tests.model.backbones.adopted.small_hugging_face import OLMOE, QWEN, small_hugging_face
from tests.small_model import pair_batch


def test_a_model_is_as_before_afterwards() -> None:
    model = small_hugging_face(QWEN, frozen=("vision",)).eval()
    before, configured = copy.deepcopy(model.state_dict()), model.config.to_dict()
    trained = [p.requires_grad for p in model.parameters()]
    layers, state = model.layers, torch.get_rng_state()
    audit(model, [pair_batch()])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == configured
    assert [p.requires_grad for p in model.parameters()] == trained
    assert all(p.grad is None for p in model.parameters())
    assert not model.training
    assert all(one is other for one, other in zip(model.layers, layers, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_loads_are_those_of_the_plans() -> None:
    model, batch = small_hugging_face(QWEN).eval(), pair_batch()
    found = audit(model, [batch, batch])
    assert [(load.path, load.modality) for load in found.loads] == [
        (layer.path, modality) for layer in model.layers for modality in ("image", "text")
    ]
    plan = model(*batch[:3]).plans[0].plan
    counts_E = plan.chosen_loads(plan.modality_T, 2)[0]
    assert found.loads[0].tokens == 2 * 16
    assert found.loads[0].loads == pytest.approx((counts_E / counts_E.sum()).tolist())


def test_dead_experts_and_verdicts() -> None:
    load = LayerLoad("layer", "text", 4, (0.5, 0.0, 0.5, 0.0), 0.5, 1.0)
    assert load.dead == (1, 3)
    assert [Setting("", *numbers).verdict for numbers in ((None,), (0.0, 0.0), (0.1, 0.2, 1.01), (0.1, 0.2, 2.0))] == [
        "fails", "dead", "alive", "doubled",
    ]  # fmt: skip
    assert Setting("", 0.1, 0.2, 8.0).verdict == "scaled"


def test_texts_without_a_tokenizer_are_bytes_that_are_no_control_ids() -> None:
    model = open_model(None, OLMOE | {"vocab_size": 40, "eos_token_id": 5}, None, 6, "float32", True)
    text_BL, mask_BL, by = encode_texts(model, None, ["ab", "a longer text"])
    assert by.startswith("bytes of the texts")
    assert mask_BL.sum(dim=1).tolist() == [2, 6]
    assert text_BL[0, 0] == text_BL[1, 0]  # the same byte
    assert bool((text_BL[mask_BL] >= 3).all()) and not bool((text_BL == 5).any())
    assert bool((text_BL < 40).all())
    output = model(None, text_BL, mask_BL)
    assert output.tokens_BSD.shape == (2, 6, 32)
    assert isinstance(audit(model, [Batch(None, text_BL, mask_BL, ("a", "b"))]).loads[0].tokens, int)
