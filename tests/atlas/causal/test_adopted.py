"""Interventions in models of Hugging Face transformers. Extra `hf`; skipped if absent."""

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'lightning-moevlm[hf]'")

from lightning_moevlm.atlas.causal.intervene import intervene, sparse_layers
from lightning_moevlm.atlas.causal.interventions import (
    ExpertOff,
    HashedChoices,
    OtherSample,
    RandomChoices,
    WithoutBest,
)
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import PairPlan
from tests.atlas.causal.test_interventions import Unchanged
from tests.model.backbones.adopted.small_hugging_face import OLMOE, QWEN, small_hugging_face
from tests.small_model import pair_batch


@pytest.mark.parametrize("config", [QWEN, OLMOE], ids=["Qwen3-VL-MoE", "OLMoE"])
def test_experts_of_adopted_models_are_switched_off(config: dict) -> None:
    model = small_hugging_face(config).eval()
    batch = pair_batch()
    inputs = batch[:3] if config is QWEN else (None, *batch[1:3])
    layer = list(sparse_layers(model))[-1]
    with torch.no_grad():
        before = model(*inputs)
        with intervene(model, layer, Unchanged()):
            assert torch.equal(model(*inputs).tokens_BSD, before.tokens_BSD), "to the bit"
        plan = next(named.plan for named in before.plans if named.layer == layer)
        assert isinstance(plan, PairPlan)
        expert = int(plan.expert_N[plan.chosen_N].mode().values)
        for change in (ExpertOff(expert), ExpertOff(expert, "nothing"), WithoutBest(), RandomChoices(), OtherSample()):
            with intervene(model, layer, change):
                assert not torch.equal(model(*inputs).tokens_BSD, before.tokens_BSD), change
        with intervene(model, layer, HashedChoices()), pytest.raises(UserError, match="does not pass to its routers"):
            model(*inputs)
        assert torch.equal(model(*inputs).tokens_BSD, before.tokens_BSD), "nothing is left behind"
