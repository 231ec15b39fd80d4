"""Numbers without sense are refused in one line, whichever option they are given to."""

import inspect
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.schedules import Ramp
from lightning_moevlm.data.read.bad_batches import BadBatches
from lightning_moevlm.model import routers
from lightning_moevlm.model.backbones import LIMoE, VLMoE
from lightning_moevlm.model.dispatch import Capacity, ModalityFactors, PaddedDispatcher
from lightning_moevlm.model.experts import ExpertInit, GatedExperts, MLPExperts
from lightning_moevlm.model.layers import DenseFFN, ModelStabilisers, MoEFFN
from lightning_moevlm.model.losses import (
    OWN_LOSSES,
    AuxiliaryLosses,
    ByOverflow,
    BySparsity,
    GlobalEntropy,
    LocalEntropy,
)
from lightning_moevlm.model.routers import Gate, Router
from lightning_moevlm.training import optim
from lightning_moevlm.training.actions import FreezeRouter, QKClip, ReviveDeadExperts, Rollback
from lightning_moevlm.training.callbacks import DivergenceGuard, Liveness, PrecisionShadow

_SMALL = {"dim": 32, "num_heads": 2, "num_blocks": 2, "hidden_dim": 64, "image_size": 16, "patch_size": 8}
_PARAMETERS = [nn.Parameter(torch.zeros(2, 2))]
_PARTS: list[Callable[..., Any]] = [
    Gate,
    *(partial(part, 16, 4) for part in vars(routers).values() if inspect.isclass(part) and issubclass(part, Router)),
    *(partial(part, 16, 4) for part in (MLPExperts, GatedExperts)),
    *(ExpertInit, Capacity, PaddedDispatcher, ModelStabilisers, LocalEntropy, GlobalEntropy, BySparsity),
    *(partial(ByOverflow, drop_rate=0.1), partial(Ramp, start=0.0, stop=1.0, num_steps=3)),
    *(FreezeRouter, QKClip, ReviveDeadExperts, Rollback),
    *(optim.AdaGC, optim.ZClip, optim.SkipSpikes, optim.GradientStabilisers, optim.GroupOptions),
    *(partial(part, _PARAMETERS) for part in (optim.Hyperball, optim.Lion, optim.MuonAdamW, optim.StableAdamW)),
    *(
        partial(part, torch.optim.SGD(_PARAMETERS, lr=1.0), total_steps=10)
        for part in (optim.WarmupCosine, optim.WarmupLinear, optim.WarmupStableDecay, optim.RateJump)
    ),
    *(partial(MoEFFN, 16), partial(DenseFFN, 16, hidden_dim=8)),
    *(DivergenceGuard, Liveness, PrecisionShadow),
    partial(BadBatches, "repeated", begin=3),
    partial(VLMoE, **_SMALL, num_vl_blocks=0, vocab_size=300, max_text_len=8),
    partial(LIMoE, **_SMALL, vocab_size=300, max_text_len=8),
]
_LEFT_OUT = ("seed", "weight")  # any seed will do; weights of losses have tests of their own


def _options() -> Iterator[Any]:
    """Every numeric option of every part, with a value that it must refuse."""
    for part in _PARTS:
        base = part.func if isinstance(part, partial) else part
        if inspect.isabstract(base):
            continue
        hints = get_type_hints(base.__init__)
        given = part.args if isinstance(part, partial) else ()
        for name in list(inspect.signature(base).parameters)[len(given) :]:
            kinds = get_args(hints[name]) or (hints[name],)
            values = [math.nan, math.inf, -math.inf] if float in kinds else [-1] if int in kinds else []
            for value in values if name not in _LEFT_OUT and get_origin(hints[name]) is not tuple else []:
                yield pytest.param(part, name, value, id=f"{base.__name__}.{name}={value}")


@pytest.mark.parametrize(("part", "option", "value"), _options())
def test_no_option_takes_a_number_without_sense(part: Callable[..., Any], option: str, value: float) -> None:
    with pytest.raises(UserError, match=str(value)):
        part(**{option: value})


@pytest.mark.parametrize("loss", OWN_LOSSES)
@pytest.mark.parametrize("value", [-1e-3, math.nan, math.inf])
def test_no_loss_takes_a_weight_below_0(loss: str, value: float) -> None:
    kind = next(each for each in get_args(get_type_hints(AuxiliaryLosses)[loss]) if each is not type(None))
    with pytest.raises(UserError, match=rf"losses\.{loss}\.weight is {value}: choose 0 or more; less than 0 would"):
        AuxiliaryLosses(**{loss: kind(weight=value)})


def test_no_ramp_of_a_weight_goes_below_0() -> None:
    kind = type(AuxiliaryLosses().router_z)
    for end in ("start", "stop"):
        ramp = Ramp(**{"start": 1.0, "stop": 1.0, "num_steps": 3, end: -1.0})  # type: ignore[arg-type]
        with pytest.raises(UserError, match=rf"losses\.router_z\.weight\.{end} is -1\.0: choose 0 or more"):
            AuxiliaryLosses(router_z=kind(weight=ramp))


def test_capacity_checks_both_modalities() -> None:
    for name in ("image", "text"):
        with pytest.raises(UserError, match=r"train_factor is 0: choose a value above 0"):
            Capacity(train_factor=ModalityFactors(**{name: 0}))


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "words"),
    [
        ({"least": 0}, [0, 2.5], [-1e-9], "0 or more"),
        ({"above": 0}, [1e-9], [0, -1], "a value above 0"),
        ({"least": 0, "most": 1}, [0, 1], [-0.1, 1.1], "a value from 0 up to 1"),
        ({"least": 0, "below": 1}, [0, 0.9], [1], "a value from 0 up to, not including, 1"),
        ({"above": 0, "most": 4}, [4], [0, 4.1], "a value above 0 up to 4"),
        ({"above": 0, "below": 1}, [0.5], [0, 1], "a value above 0 up to, not including, 1"),
    ],
)
def test_ranges_are_checked_and_told(
    bounds: dict[str, float], inside: list[float], outside: list[float], words: str
) -> None:
    for value in inside:
        check_number("option", value, **bounds)
    for value in [*outside, math.nan, math.inf, -math.inf]:
        with pytest.raises(UserError) as told:
            check_number("option", value, **bounds, advice=", or null")
        assert str(told.value) == f"option is {value}: choose {words}, or null"
