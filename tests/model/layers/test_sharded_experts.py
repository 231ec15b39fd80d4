"""Stacked experts under FSDP2: two gloo processes that share the parameters compute what one computes alone."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.sequence_layout import Layout, Span
from lightning_moevlm.model.experts import GatedExperts
from lightning_moevlm.model.layers import MoEFFN, initialise


def build() -> MoEFFN:
    layer = MoEFFN(16, 4, experts=lambda dim, num_experts: GatedExperts(dim, num_experts, 24))
    initialise(layer, seed=0, std=0.3)
    return layer


def gradients(layer: MoEFFN, samples: slice) -> dict[str, Tensor]:
    tokens = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))[samples]
    layout = Layout((Span(Modality.IMAGE, 0, 6),), torch.ones(tokens.shape[:2], dtype=torch.bool))
    layer(tokens, layout).tokens_BSD.square().sum().backward()
    return {name: parameter.grad for name, parameter in layer.named_parameters()}  # type: ignore[misc]


def work(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    store = Path(folder) / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    layer = build()
    fully_shard(layer, mesh=mesh)
    assert next(layer.parameters()).to_local().shape[0] == 2  # half of 4 experts each
    found = {
        name: gradient.full_tensor()  # type: ignore[attr-defined]
        for name, gradient in gradients(layer, slice(2 * rank, 2 * rank + 2)).items()
    }
    if rank == 0:
        torch.save(found, Path(folder) / "gradients.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_sharded_experts_have_the_gradients_of_whole_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
    sharded = torch.load(tmp_path / "gradients.pt")
    for name, gradient in gradients(build(), slice(0, 4)).items():
        # the sum over samples of one process; the mean over two processes is half of it
        torch.testing.assert_close(sharded[name] * 2, gradient, msg=name)
