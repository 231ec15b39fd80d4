"""Small models that route by a known rule, and scenes to observe them on."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from lightning_moevlm.atlas.causal.examine import Examination, To, examine
from lightning_moevlm.atlas.causal.groups import group_samples
from lightning_moevlm.atlas.causal.observed import observed_groups
from lightning_moevlm.atlas.make_atlas import TRACE_FILE, Atlas, make_atlas
from lightning_moevlm.atlas.probe.probe_set import ProbeSet
from lightning_moevlm.atlas.routing.trace import Trace
from lightning_moevlm.atlas.statistics.claims import ALPHA
from lightning_moevlm.contracts.routing_plan import PairPlan, RoutingInput
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.write.demo.drawing_catalogue import first_drawings
from lightning_moevlm.data.write.demo.scene_graph import GROUNDS
from lightning_moevlm.model.backbones import LIMoE
from lightning_moevlm.model.initial_weights import initialise
from lightning_moevlm.model.layers import MoEFFN
from lightning_moevlm.model.objectives import Draws, MaskedModelling
from lightning_moevlm.model.routers import Router
from lightning_moevlm.model.routers.choices import even_plan
from lightning_moevlm.model.routers.random_bits import scramble

SIZES = {"image_size": 32, "max_text_len": 32, "vocab_size": 900}
NUM_DRAWINGS = 64
NUM_EXPERTS = 4


class PlantedRouter(Router):
    """Sends some tokens to expert 0, and every other one to the others by its identity."""

    reads_identity = True
    experts_per_token = 1.0

    def __init__(self, dim: int, num_experts: int, planted: frozenset[int]) -> None:
        super().__init__(dim, num_experts)
        self.planted = torch.tensor(sorted(planted))

    def forward(self, inputs: RoutingInput) -> PairPlan:
        assert inputs.identity_T is not None
        other_T = 1 + scramble(inputs.identity_T, seed=0).long().abs() % (self.num_experts - 1)
        expert_T = torch.where(torch.isin(inputs.identity_T, self.planted), 0, other_T)
        return even_plan(inputs, expert_T.unsqueeze(-1), self.num_experts)


def open_data(root: Path) -> ShardDataModule:
    return ShardDataModule(str(root), batch_size=32, **SIZES)


def small_model(router: Callable[[int, int], Router], top_k: int = 1) -> LIMoE:
    """Two blocks of width 16, experts in one of them; images of 16 patches."""
    moe = partial(MoEFFN, num_experts=NUM_EXPERTS, router=router)
    model = LIMoE(dim=16, num_heads=2, num_blocks=2, hidden_dim=16, patch_size=8, moe=moe, **SIZES)
    initialise(model, 0)
    return model


def tokens_of(data: ShardDataModule, category: str) -> frozenset[int]:
    """Ids of the words that only the objects of a category are named by."""
    rest = " ".join([" a an two three left right of above below and with on ground", *GROUNDS])
    own, others = set[int](), set(data.tokenizer.ids(rest))
    for drawing in first_drawings(NUM_DRAWINGS):
        into = own if drawing.category == category else others
        for name in (drawing.name, drawing.plural):
            into |= {*data.tokenizer.ids(name), *data.tokenizer.ids(f" {name}")}
    return frozenset(own - others)


def observe(root: Path, model: LIMoE, folder: Path, draws: int = 99, seed: int = 0, samples: int = 160) -> Atlas:
    probe = ProbeSet(open_data(root), "train", samples, seed)
    return make_atlas(model, MaskedModelling(model.spec), probe, folder, draws)


def examine_atlas(root: Path, model: LIMoE, atlas: Atlas, folder: Path, to: To = "next") -> Examination:
    """Remove every expert of an observed model, which has to remember its own features."""
    from tests.atlas.causal.test_scores import Remember

    record, observed = atlas.probe, observed_groups(atlas)
    probe = ProbeSet(open_data(root), "train", sum(each.num_samples for each in record.sources), record.seed)
    groups = group_samples(Trace(folder / TRACE_FILE), atlas.names, {each.group for each in observed})
    model.eval()
    return examine(model, Remember(model).eval(), Draws(0), probe, atlas.layers, groups, observed, to)


def claims(atlas: Atlas) -> set[str]:
    """Labels by which an expert is said to be specialised, whatever value it serves."""
    return {
        found.label.name
        for layer in atlas.of_layers
        for found, p_E in zip(layer.results, layer.adjusted, strict=True)
        if (p_E <= ALPHA).any()
    }
