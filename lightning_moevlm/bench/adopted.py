"""`moevlm bench adopted`: what observing costs a model of Hugging Face, and what runs its experts fastest.

    transformers, BACK-END   the model as transformers built it, by each of its back-ends for experts
    observed, BACK-END       the same with our layers, which ask its routers and record plans
    ours, DISPATCHER         observed, its experts run by a dispatcher of ours

A step is forward and backward of the features of a language model; its plans are kept to the end, as in a training. All
share one set of weights. Observing computes the same numbers to the bit, dispatchers of ours the same to rounding.
"""

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lightning_moevlm.bench.candidates import Candidate
from lightning_moevlm.bench.timing import Ratio, best, interleave, peak_mib, ratio
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.backbones import HuggingFaceModel
from lightning_moevlm.model.backbones.adopted.build import Origin, build, draw
from lightning_moevlm.model.backbones.backbone import BackboneOutput
from lightning_moevlm.model.dispatch import (
    AutoDispatcher,
    Dispatcher,
    GroupedDispatcher,
    PaddedDispatcher,
    SegmentDispatcher,
)
from lightning_moevlm.model.initial_weights import defer_initialisation

DType: TypeAlias = Literal["float32", "bfloat16"]
Backend: TypeAlias = Literal["eager", "grouped_mm"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
PLAIN, OBSERVED, OURS = "transformers", "observed", "ours"
DISPATCHERS: Mapping[str, type[Dispatcher]] = {
    "auto": AutoDispatcher,
    "segments": SegmentDispatcher,
    "grouped": GroupedDispatcher,
    "padded": PaddedDispatcher,
}
_VOCABULARY = 1000


class Size(NamedTuple):
    """A model and a batch of texts for it.

    config: of the model, as `HuggingFaceModel` takes it.
    sequences: texts of a batch.
    length: tokens of each.
    """

    config: dict[str, Any]
    sequences: int
    length: int


def _olmoe(width: int, num_heads: int, num_experts: int, expert_width: int, top_k: int) -> dict[str, Any]:
    """Return an OLMoE of four layers."""
    return {
        "model_type": "olmoe", "hidden_size": width, "intermediate_size": expert_width, "num_hidden_layers": 4,
        "num_attention_heads": num_heads, "num_key_value_heads": num_heads, "num_experts": num_experts,
        "num_experts_per_tok": top_k, "max_position_embeddings": 4096, "vocab_size": _VOCABULARY, "eos_token_id": 3,
        "bos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip


SIZES: Mapping[str, Size] = {
    "small": Size(_olmoe(256, 8, num_experts=16, expert_width=256, top_k=2), 4, 256),
    "large": Size(_olmoe(2048, 16, num_experts=64, expert_width=1024, top_k=8), 8, 2048),
}
"""`large` has the widths of OLMoE-1B-7B, 1.7 billion parameters in four of its layers."""


class AdoptedTimes(NamedTuple):
    """Times and memory of all candidates.

    seconds: by candidate, one per round.
    peaks: of a step without the weights, in MiB, by candidate.
    plans: MiB of the plans of a step.
    setting: device, dtype and size, for the records.
    """

    seconds: dict[str, list[float]]
    peaks: dict[str, float]
    plans: float
    setting: dict[str, object]

    def over_plain(self, backend: str) -> Ratio:
        """Return the time of the observed step over that of the plain one, by the same back-end."""
        return ratio(self.seconds, named(OBSERVED, backend), named(PLAIN, backend))

    def added_mib(self, backend: str) -> float:
        """Return what observing adds to the peak."""
        return self.peaks[named(OBSERVED, backend)] - self.peaks[named(PLAIN, backend)]

    def fastest(self, kind: str) -> str:
        """Return the fastest candidate of a kind."""
        return min((name for name in self.seconds if _kind(name) == kind), key=lambda name: best(self.seconds[name]))

    def over(self, name: str) -> str:
        """Return what a candidate is compared with: the plain model by the same back-end, or by its fastest one."""
        same = name.replace(OBSERVED, PLAIN)
        return same if _kind(name) == OBSERVED else self.fastest(PLAIN)

    def finding(self) -> str:
        """Say which dispatcher of ours is fastest, beside the fastest back-end of transformers."""
        mine, theirs = self.fastest(OURS), self.fastest(PLAIN)
        times = ratio(self.seconds, mine, theirs)
        return f"fastest of ours: {mine}, {times.median:.3f} of {theirs} (of the best times {times.best:.3f})"

    def records(self) -> list[dict[str, object]]:
        """Return one record per candidate, as `--json` writes them."""
        return [
            {
                "bench": "adopted",
                "impl": name,
                **self.setting,
                "median_ms": round(1e3 * statistics.median(times), 3),
                "over": self.over(name),
                "ratio": round(ratio(self.seconds, name, self.over(name)).median, 4),
                "peak_mib": round(self.peaks[name], 2),
                "plans_mib": None if _kind(name) == PLAIN else round(self.plans, 2),
                "rounds": len(times),
            }
            for name, times in self.seconds.items()
        ]


def named(kind: str, way: str) -> str:
    """Return the name of a candidate: its kind, and its back-end or dispatcher."""
    return f"{kind}, {way}"


def _kind(name: str) -> str:
    return name.partition(", ")[0]


def adopted_candidates(size: Size, device: str = "cpu", dtype: DType = "float32") -> tuple[list[Candidate], float]:
    """Return a step of each candidate over random tokens, and the MiB of the plans of one.

    Raises:
        UserError: transformers is missing.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (size.sequences, size.length)
    ids_BL = torch.randint(10, size.config["vocab_size"], shape, generator=generator).to(device)
    mask_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    origin = Origin(None, size.config, dtype, None, None, True, size.config["vocab_size"])
    drawn: Any = build(origin).to(device)
    draw(drawn, 0)
    weights: dict[str, Tensor] = drawn.state_dict()

    def plain(backend: Backend) -> Candidate:
        model: Any = build(origin)
        model.set_experts_implementation(backend)
        body = getattr(_with_weights(model, weights, device), model.base_model_prefix)
        run = partial(body, input_ids=ids_BL, attention_mask=mask_BL.long(), use_cache=False)
        return _candidate(named(PLAIN, backend), model, run, lambda found: found.last_hidden_state)

    def ours(name: str, **options: Any) -> tuple[Candidate, HuggingFaceModel]:
        with defer_initialisation():  # weights are given
            model = HuggingFaceModel(
                config=size.config,
                vocab_size=size.config["vocab_size"],
                max_text_len=size.length,
                dtype=dtype,
                **options,
            )
        _with_weights(model.model, weights, device)
        run = partial(model.to(device).train(), None, ids_BL, mask_BL)
        return _candidate(name, model, run, lambda found: found.tokens_BSD), model

    observed = [ours(named(OBSERVED, backend), experts_backend=backend) for backend in BACKENDS]
    dispatched = [ours(named(OURS, name), dispatcher=dispatcher()) for name, dispatcher in DISPATCHERS.items()]
    with torch.no_grad():
        plans = plans_mib(observed[0][1](None, ids_BL, mask_BL))
    return [*map(plain, BACKENDS), *(candidate for candidate, _ in (*observed, *dispatched))], plans


def measure_adopted(
    rounds: int, size: Size, tick: Callable[[], None], device: str = "cpu", dtype: DType = "float32"
) -> AdoptedTimes:
    """Time all in interleaved rounds, then measure the peak of a step of each.

    Raises:
        UserError: transformers is missing, or the device has too little memory.
    """
    try:
        candidates, plans = adopted_candidates(size, device, dtype)
        seconds = interleave(candidates, rounds, tick)
        peaks = {each.name: peak_mib(each.step, each.release, device) for each in candidates if each.release}
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the device has too little memory for {size.sequences} texts of {size.length} tokens: give fewer by "
            "--sequences, or choose --size small"
        ) from error
    setting: dict[str, object] = {
        "device": device,
        "dtype": dtype,
        "width": size.config["hidden_size"],
        "num_experts": size.config["num_experts"],
        "sequences": size.sequences,
        "length": size.length,
    }
    return AdoptedTimes(seconds, peaks, plans, setting)


def plans_mib(output: BackboneOutput) -> float:
    """Return the MiB of the plans of a pass, each tensor once."""
    parts = (part for one in output.plans for part in one.plan if isinstance(part, Tensor))
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    return sum(storages.values()) / 2**20


def refuse_missing() -> None:
    """Refuse a machine without transformers.

    Raises:
        UserError: with the command that installs it.
    """
    from importlib.util import find_spec

    if find_spec("transformers") is None:
        raise UserError("moevlm bench adopted needs transformers: pip install 'lightning-moevlm[hf]'")


def _with_weights(model: Any, weights: Mapping[str, Tensor], device: str) -> Any:
    """Let a model of transformers use such weights on a device, in place, with gradients of its own; return it."""
    mine = {name: weights[name.replace(".router.theirs", "")] for name in model.state_dict()}
    model.load_state_dict(mine, assign=True)
    return model.to(device)  # buffers that are in no checkpoint


def _candidate(name: str, model: nn.Module, run: Callable[[], Any], features_of: Callable[[Any], Tensor]) -> Candidate:
    def release() -> None:
        model.zero_grad(set_to_none=True)

    def step() -> None:
        found = run()  # with its plans
        features_of(found).float().square().mean().backward()
        release()  # the next candidate has its own

    return Candidate(name, step, release)
