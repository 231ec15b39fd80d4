"""`moevlm bench adopted`: what observing the routing adds to a step of a model of Hugging Face.

    plain      the model as transformers built it
    observed   the same model and weights with our layers, which ask its routers and record plans

A step is forward and backward of the features of a language model. Both compute the same numbers to the bit.
"""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_moevlm.bench.candidates import Candidate
from lightning_moevlm.bench.timing import Ratio, interleave, peak_mib, ratio
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.backbones import HuggingFaceModel
from lightning_moevlm.model.backbones.adopted.build import Origin, build, draw

PLAIN, OBSERVED = "transformers", "observed"
_VOCABULARY = 1000

MODEL: dict[str, Any] = {
    "model_type": "olmoe", "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 8, "num_experts": 16, "num_experts_per_tok": 2,
    "max_position_embeddings": 2048, "vocab_size": _VOCABULARY, "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
"""Width 256, 4 layers, 16 experts of 256, top-2."""


class ObservingTimes(NamedTuple):
    """Seconds by candidate, one per round; peaks in MiB by candidate."""

    seconds: dict[str, list[float]]
    peaks: dict[str, float]

    @property
    def over_plain(self) -> Ratio:
        """Return the time of the observed step over that of the plain one."""
        return ratio(self.seconds, OBSERVED, PLAIN)

    def records(self) -> list[dict[str, object]]:
        """Return one record per candidate, as `--json` writes them."""
        return [
            {
                "bench": "adopted",
                "impl": name,
                "median_ms": round(1e3 * statistics.median(times), 3),
                "peak_mib": round(self.peaks[name], 2),
                "rounds": len(times),
            }
            for name, times in self.seconds.items()
        ]


def observing_candidates(num_sequences: int, length: int, config: dict[str, Any] | None = None) -> list[Candidate]:
    """Return a step of the plain and of the observed model, over random tokens.

    Raises:
        UserError: transformers is missing.
    """
    config = MODEL if config is None else config
    generator = torch.Generator().manual_seed(0)
    ids_BL = torch.randint(10, config["vocab_size"], (num_sequences, length), generator=generator)
    mask_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    plain: Any = build(Origin(None, config, "float32", None, None, True, _VOCABULARY)).train()
    draw(plain, 0)
    observed = HuggingFaceModel(config=config, vocab_size=config["vocab_size"], max_text_len=length).train()
    body = getattr(plain, plain.base_model_prefix)

    def run_plain() -> Tensor:
        features: Tensor = body(input_ids=ids_BL, attention_mask=mask_BL.long(), use_cache=False).last_hidden_state
        return features

    return [
        _candidate(PLAIN, plain, run_plain),
        _candidate(OBSERVED, observed, lambda: observed(None, ids_BL, mask_BL).tokens_BSD),
    ]


def measure_observing(rounds: int, num_sequences: int, length: int, tick: Callable[[], None]) -> ObservingTimes:
    """Time both in interleaved rounds, then measure the peaks of a step each."""
    candidates = observing_candidates(num_sequences, length)
    seconds = interleave(candidates, rounds, tick)
    peaks = {}
    for candidate in candidates:
        assert candidate.release is not None
        peaks[candidate.name] = peak_mib(candidate.step, candidate.release)
    return ObservingTimes(seconds, peaks)


def refuse_missing() -> None:
    """Refuse a machine without transformers.

    Raises:
        UserError: with the command that installs it.
    """
    from importlib.util import find_spec

    if find_spec("transformers") is None:
        raise UserError("moevlm bench adopted needs transformers: pip install 'lightning-moevlm[hf]'")


def _candidate(name: str, model: nn.Module, run: Callable[[], Tensor]) -> Candidate:
    def release() -> None:
        model.zero_grad(set_to_none=True)

    def step() -> None:
        release()
        run().square().mean().backward()

    return Candidate(name, step, release)
