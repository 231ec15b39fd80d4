"""A training step between logging steps does not let the host wait for a GPU, but where the code says so.

Counted on the CPU: every operation that reads a value of a tensor, or whose shape depends on one, off the CPU lets the
host wait until the device has computed it. Dispatch runs as it does off the CPU.
"""

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.model.dispatch import grouped_mm
from tests.small_run import BACKBONE, budget

_READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount", "_unique2", "unique_dim"}
"""Operations that read values, or give a shape that depends on them."""
_READ_BY_METHOD = {Tensor.tolist, Tensor.cpu, Tensor.numpy}
MEASURED = 4
"""The plain step that is looked at: neither a first one nor a tenth one, at which losses are read."""
DOCUMENTED = Counter(
    {
        # how many words are hidden follows from the texts, which are on the device
        "model/objectives/masked_modelling.py find < forward": 2,
        # masks of patches are drawn on the host: nobody waits
        "model/objectives/masked_modelling.py find < _hidden_patches": 2,
    }
)
SMALL = (
    "--data.root=data/shards/scenes", "--data.batch_size=4", "--data.num_workers=0", "--data.image_size=32",
    f"{BACKBONE}.dim=16", f"{BACKBONE}.num_heads=2", f"{BACKBONE}.hidden_dim=16", f"{BACKBONE}.patch_size=8",
    f"{BACKBONE}.moe.init_args.num_experts=4", f"{BACKBONE}.moe.init_args.experts.init_args.hidden_dim=16",
    f"{BACKBONE}.moe.init_args.dispatcher=GroupedDispatcher", "--trainer.accelerator=cpu",
    "--trainer.precision=bf16-mixed", "--trainer.log_every_n_steps=50", "--trainer.limit_val_batches=1",
    "--trainer.num_sanity_val_steps=0", *budget(MEASURED + 3),  # before the last step receipts are due
)  # fmt: skip


class _Reads(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        places = args[1] if name.startswith(("index", "_index")) and len(args) > 1 else ()
        by_mask = isinstance(places, list | tuple) and any(
            isinstance(each, Tensor) and each.dtype == torch.bool for each in places
        )
        is_repeat = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in _READS or by_mask or is_repeat:
            _note(self.found)
        return func(*args, **kwargs)


class _Methods(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        if func in _READ_BY_METHOD:
            _note(self.found)
        return func(*args, **(kwargs or {}))


def _note(found: Counter[str]) -> None:
    """Count the innermost function of the package that runs, with its caller; else the innermost one of any file.

    Reading data is left out: it happens in the host's memory.
    """
    frame: FrameType | None = sys._getframe(2)
    outside, inside = "", []
    while frame is not None and len(inside) < 2:
        path, _, place = frame.f_code.co_filename.partition("/lightning_moevlm/")
        if place:
            inside.append(f"{place} {frame.f_code.co_name}")
        elif not outside and "/torch/utils/" not in path:
            outside = f"{path.rpartition('/')[2]} {frame.f_code.co_name}"
        frame = frame.f_back
    if not inside or not inside[0].startswith("data/"):
        found[f"{inside[0]} < {inside[1].rpartition(' ')[2]}" if len(inside) == 2 else outside] += 1


class CountWaits(Callback):
    """Counts during one step, up to the start of the next one."""

    found: ClassVar[Counter[str]] = Counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if batch_idx == MEASURED:
            self.modes = (_Methods(self.found), _Reads(self.found))
            for mode in self.modes:
                mode.__enter__()
        elif batch_idx == MEASURED + 1:
            for mode in reversed(self.modes):
                mode.__exit__(None, None, None)


@pytest.mark.parametrize(
    "config",
    [
        "conf/quickstart.yaml",
        pytest.param("conf/vl_moe/small.yaml", marks=pytest.mark.slow),  # 12 blocks: 6 s
    ],
)
def test_a_plain_step_waits_for_what_is_documented(
    config: str, moevlm: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped_mm, "_is_read_at_once", lambda tokens_TD: False)
    CountWaits.found.clear()
    moevlm("fit", "-c", config, *SMALL, f"--trainer.callbacks+={__name__}.CountWaits")
    assert CountWaits.found == DOCUMENTED
