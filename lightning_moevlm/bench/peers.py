"""Layers of other packages, if they are installed (extra `peers`), with the same router rows and tokens."""

from importlib.util import find_spec
from typing import Literal

import torch
from torch import nn

from lightning_moevlm.bench.candidates import Candidate, training
from lightning_moevlm.bench.cases import Case, Tokens

Peers = Literal["all", "none", "transformers", "st-moe"]

TRANSFORMERS_EAGER, TRANSFORMERS_GROUPED = "transformers eager", "transformers grouped_mm"
_ST_MOE_GROUPS = 8  # samples; its capacity is per sample


def peer_candidates(case: Case, tokens: Tokens, peers: Peers) -> list[Candidate]:
    """Return the candidates of the chosen packages that are installed and can run the case."""
    found: list[Candidate] = []
    if case.shape.act != "swiglu":
        return found  # both are gated
    if peers in ("all", "transformers") and find_spec("transformers"):
        found += [
            _mixtral(TRANSFORMERS_EAGER, case, tokens, "eager"),
            _mixtral(TRANSFORMERS_GROUPED, case, tokens, "grouped_mm"),
        ]
    if peers in ("all", "st-moe") and find_spec("st_moe_pytorch") and case.shape.T % _ST_MOE_GROUPS == 0:
        found.append(_st_moe("st-moe capacity 1.25 (drops)", case, tokens, 1.25))
        if case.skew == "balanced":  # a factor that drops nothing under skew would be E
            found.append(_st_moe("st-moe capacity 2.5", case, tokens, 2.5))
    return found


def missing_peers(peers: Peers) -> list[str]:
    """Return the chosen packages that are not installed."""
    wanted = {"transformers": ("all", "transformers"), "st_moe_pytorch": ("all", "st-moe")}
    return [package for package, asked in wanted.items() if peers in asked and not find_spec(package)]


def _mixtral(name: str, case: Case, tokens: Tokens, implementation: str) -> Candidate:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    shape = case.shape
    config = MixtralConfig(
        hidden_size=shape.d, intermediate_size=shape.f, num_local_experts=shape.E, num_experts_per_tok=shape.k
    )
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.02)
        block.gate.weight.copy_(tokens.router_ED)
    return training(name, block, tokens, (1, shape.T, shape.d))


def _st_moe(name: str, case: Case, tokens: Tokens, capacity: float) -> Candidate:
    from st_moe_pytorch import MoE

    shape = case.shape
    layer = MoE(
        dim=shape.d,
        num_experts=shape.E,
        expert_hidden_mult=shape.f * 1.5 / shape.d,  # it takes two thirds of it, as GEGLU has a third matrix
        threshold_train=0.0,
        capacity_factor_train=capacity,
        gating_top_n=shape.k,
    )
    with torch.no_grad():
        layer.gate.to_gates.weight.copy_(tokens.router_ED)
    return training(name, layer, tokens, (_ST_MOE_GROUPS, shape.T // _ST_MOE_GROUPS, shape.d))
