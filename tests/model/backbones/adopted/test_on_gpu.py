"""Models of transformers on a GPU: observed ones equal unmodified ones to the bit, and our dispatchers come near.

GPU kernels may add in another order each time. So the unmodified model must equal itself first, under settings that
make it, and where it does without them, there too. One case runs on the CPU, so that the checks themselves are tried.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'lightning-moevlm[hf]'")

from lightning_moevlm.data.load.device_stage import to_device
from lightning_moevlm.model.backbones import HuggingFaceModel
from lightning_moevlm.model.backbones.adopted.build import DType, ExpertsBackend, Origin, build, takes
from lightning_moevlm.model.dispatch import (
    AutoDispatcher,
    Dispatcher,
    GroupedDispatcher,
    LoopDispatcher,
    PaddedDispatcher,
    SegmentDispatcher,
)
from lightning_moevlm.model.generation import Decoding, generate
from lightning_moevlm.model.objectives import NextToken
from tests.model.backbones.adopted.small_hugging_face import DEEPSEEK, OLMOE, QWEN, small_hugging_face
from tests.small_model import pair_batch

families = pytest.mark.parametrize("config", [OLMOE, DEEPSEEK, QWEN], ids=lambda config: config["model_type"])
backends = pytest.mark.parametrize("backend", ["eager", "grouped_mm"])
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
SHALLOW = OLMOE | {"num_hidden_layers": 1}
"""A later router may choose otherwise after another rounding."""
NEAR: dict[DType, float] = {"float32": 1e-4, "bfloat16": 0.05}


class Step(NamedTuple):
    """What a step computes."""

    features: Tensor
    gradients: dict[str, Tensor | None]


def pair(
    config: dict[str, Any], device: str, dtype: DType, checkpointing: bool = False, **options: Any
) -> tuple[Any, HuggingFaceModel]:
    """Return the model as transformers builds it, by the same back-end, and ours with its weights; in training."""
    ours = small_hugging_face(config, dtype=dtype, gradient_checkpointing=checkpointing, **options)
    plain: Any = build(Origin(None, config, dtype, None, options.get("experts_backend", "eager"), True, 300))
    plain.load_state_dict({name.replace(".router.theirs", ""): v for name, v in ours.model.state_dict().items()})
    if checkpointing:
        plain.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return plain.to(device).train(), ours.to(device).train()


def inputs_of(ours: HuggingFaceModel, device: str, length: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what ours takes, and what its body takes, of the beginnings of some pairs, or of texts alone."""
    batch = to_device(pair_batch(), torch.device(device))
    assert batch.text_BL is not None and batch.text_mask_BL is not None
    images = None if ours.images is None else batch.images_BRYX
    mine = (images, batch.text_BL[:, :length], batch.text_mask_BL[:, :length])
    ids_BS, layout, seen, _ = ours._join(*mine)
    if seen:
        seen = seen | {"mm_token_type_ids": (ids_BS == ours.config.image_token_id).long()}
    return mine, {"input_ids": ids_BS, "attention_mask": layout.valid_BS.long(), **seen}


def gradients(model: Any, features: Tensor, valid: Tensor) -> Step:
    model.zero_grad(set_to_none=True)
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(3)).to(features)
    (features * weight)[valid.bool()].float().sum().backward()
    found = {name.replace(".router.theirs", ""): each.grad for name, each in model.named_parameters()}
    return Step(features.detach(), found)


def both_steps(plain: Any, ours: HuggingFaceModel, device: str) -> tuple[Step, Step, Step]:
    """Return a step of the unmodified model twice, and one of ours."""
    mine, theirs = inputs_of(ours, device, 8)
    body = getattr(plain, plain.base_model_prefix)
    assert not ours.images or takes(body.forward, "mm_token_type_ids")
    valid = theirs["attention_mask"]
    first, second = (gradients(plain, body(**theirs, use_cache=False).last_hidden_state, valid) for _ in range(2))
    return first, second, gradients(ours.model, ours(*mine).tokens_BSD, valid)


def differing(one: Step, other: Step) -> list[str]:
    """Return the names of what is not equal to the bit."""
    assert one.gradients.keys() == other.gradients.keys()
    found = [] if torch.equal(one.features, other.features) else ["features"]
    for name, gradient in one.gradients.items():
        again = other.gradients[name]
        same = gradient is again if gradient is None or again is None else torch.equal(gradient, again)
        found += [] if same else [name]
    return found


@contextmanager
def repeatable() -> Iterator[None]:
    """Let torch add in the same order each time wherever it knows how."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")  # integers are added by kernels that warn
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def check_steps(
    config: dict[str, Any], backend: ExpertsBackend, dtype: DType, checkpointing: bool, device: str
) -> None:
    plain, ours = pair(config, device, dtype, checkpointing, experts_backend=backend)
    with repeatable():
        first, second, found = both_steps(plain, ours, device)
    assert differing(first, second) == [], "the unmodified model differs from itself"
    assert any(bool(each.any()) for each in found.gradients.values() if each is not None)
    assert differing(first, found) == []


def check_generation(config: dict[str, Any], backend: ExpertsBackend, dtype: DType, device: str) -> None:
    plain, ours = (each.eval() for each in pair(config, device, dtype, experts_backend=backend))
    (images, text_BL, mask_BL), theirs = inputs_of(ours, device, 3)
    logits = partial(NextToken(ours.spec).logits, ours)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": 3, "pad_token_id": 0}
    with repeatable(), torch.no_grad():
        wanted = [plain.generate(**theirs, **options)[:, theirs["input_ids"].shape[1] :] for _ in range(2)]
        found = generate(ours, logits, images, text_BL, mask_BL, Decoding(max_new_tokens=5)).text_BN
    assert torch.equal(*wanted), "the unmodified model differs from itself"
    assert torch.equal(found[:, : wanted[0].shape[1]], wanted[0])


def check_dispatcher(dispatcher: Dispatcher, dtype: DType, device: str) -> None:
    plain, ours = pair(SHALLOW, device, dtype, dispatcher=dispatcher)
    expected, _, found = both_steps(plain, ours, device)
    pairs = [(expected.features, found.features)]
    pairs += [(each, found.gradients[name]) for name, each in expected.gradients.items() if each is not None]  # type: ignore[misc]
    assert len(pairs) > 8
    for one, other in pairs:
        assert float((other - one).abs().max()) <= NEAR[dtype] * float(one.abs().max())


def test_the_checks_pass_on_the_cpu() -> None:
    check_steps(QWEN, "grouped_mm", "bfloat16", True, "cpu")
    check_generation(QWEN, "grouped_mm", "bfloat16", "cpu")
    check_dispatcher(SegmentDispatcher(), "bfloat16", "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@dtypes
@backends
@families
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_observed_steps_are_exact(
    config: dict[str, Any], backend: ExpertsBackend, dtype: DType, checkpointing: bool
) -> None:
    check_steps(config, backend, dtype, checkpointing, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@dtypes
@backends
@families
def test_observed_models_generate_the_same_tokens(
    config: dict[str, Any], backend: ExpertsBackend, dtype: DType
) -> None:
    check_generation(config, backend, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@backends
@families
def test_observed_steps_are_exact_with_the_usual_kernels(config: dict[str, Any], backend: ExpertsBackend) -> None:
    first, second, found = both_steps(*pair(config, "cuda", "bfloat16", experts_backend=backend), "cuda")
    unstable = set(differing(first, second))
    if "features" in unstable:
        pytest.skip(f"the unmodified model differs from itself in {len(unstable)} tensors")
    assert set(differing(first, found)) <= unstable


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@dtypes
@pytest.mark.parametrize(
    "dispatcher",
    [LoopDispatcher(), SegmentDispatcher(), GroupedDispatcher(), PaddedDispatcher(), AutoDispatcher()],
    ids=lambda each: type(each).__name__,
)
def test_our_dispatchers_come_near(dispatcher: Dispatcher, dtype: DType) -> None:
    check_dispatcher(dispatcher, dtype, "cuda")
