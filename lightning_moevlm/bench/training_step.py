"""`moevlm bench step`: the cost of Lightning, telemetry and MLflow in a training step, and that of sparsity.

    overhead   one model on the same batches: the bare loop of PyTorch (losses, backward, clip, update, schedule)
               against `Trainer.fit` with the callbacks of `moevlm fit` and MLflow on SQLite, logging every 50 steps;
               in turns of ten steps
    sparsity   the bare loop of a sparse model against that of its dense twin at equal active FLOPs

Steps that log and steps that write receipts count by their share of all steps. Work before the first step and after
the last ones does not count.
"""

import contextlib
import io
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset

from lightning_moevlm.bench.candidates import Candidate
from lightning_moevlm.bench.timing import Ratio, interleave, ratio
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.data.load.device_stage import to_device
from lightning_moevlm.model.backbones import LIMoE, VLMoE
from lightning_moevlm.model.dispatch import Capacity
from lightning_moevlm.model.experts import MLPExperts
from lightning_moevlm.model.layers import ModelStabilisers, MoEFFN
from lightning_moevlm.model.objectives import MaskedModelling
from lightning_moevlm.model.objectives.masked_modelling import TermWeights
from lightning_moevlm.model.routers import TopKRouter
from lightning_moevlm.tracking import RunLogger
from lightning_moevlm.tracking.store import prepare_store
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.callbacks import DivergenceGuard, FlightRecorder, Liveness, StepProgress, Telemetry
from lightning_moevlm.training.optim import GradientStabilisers, WarmupCosine, parameter_groups

TURN = 10
WARM_UP = TURN
LOG_EVERY = 50
NUM_STEPS = 2 * LOG_EVERY  # as many as there are between receipts
_IMAGE, _TEXT, _VOCABULARY = 64, 32, 640

BARE, LIGHTNING, SPARSE, DENSE = "bare loop", "Lightning, telemetry, MLflow", "sparse", "dense twin"


class StepTimes(NamedTuple):
    """Milliseconds per step, one per round: of the bare loop and of the whole trainer, rounds in the same order."""

    bare: list[float]
    whole: list[float]

    @property
    def added(self) -> float:
        """Time that the trainer adds to a step, in ms: median over rounds."""
        return statistics.median(whole - bare for bare, whole in zip(self.bare, self.whole, strict=True))

    def records(self) -> list[dict[str, object]]:
        """Return one record per way to train, as `--json` writes them."""
        return [
            {"bench": "step", "impl": name, "median_ms": round(statistics.median(times), 3), "rounds": len(times)}
            for name, times in ((BARE, self.bare), (LIGHTNING, self.whole))
        ]


def measure_overhead(rounds: int, tick: Callable[[], None], device: str = "cpu") -> StepTimes:
    """Train a small VL-MoE for `NUM_STEPS` steps in each way and round; tick after each round.

    The ways take turns of `TURN` steps, so that a slow spell affects both. One thread, because the added work runs on
    one, and a small step on several threads mostly waits.
    """
    batches = [pair_batch(2, seed, device) for seed in range(8)]
    times = StepTimes([], [])
    with tempfile.TemporaryDirectory() as folder, _one_thread(), _quiet():
        uri = f"sqlite:///{Path(folder) / 'mlflow.db'}"
        prepare_store(uri)
        for _ in range(rounds):
            by_hand, by_trainer = small_module().to(device), small_module()
            bare, whole = milliseconds_in_turns(by_hand, by_trainer, batches, uri, folder)
            times.bare.append(bare)
            times.whole.append(whole)
            tick()
    return times


def bare_step(module: VisionLanguageModule, batches: Sequence[Batch]) -> Callable[[], None]:
    """Return a function that trains one step without a framework."""
    module.train()
    optimizer = module.optimizer_factory(parameter_groups(module.named_parameters()))
    schedule = WarmupCosine(optimizer, total_steps=WARM_UP + NUM_STEPS)
    steps = iter(range(10**9))

    def step() -> None:
        number = next(steps)
        _, report = module.compute_losses(batches[number % len(batches)], number)
        optimizer.zero_grad(set_to_none=True)
        report.total_loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()

    return step


def milliseconds_in_turns(
    by_hand: VisionLanguageModule, by_trainer: VisionLanguageModule, batches: Sequence[Batch], uri: str, folder: str
) -> tuple[float, float]:
    """Return the mean time of a step of the bare loop, and of `Trainer.fit` with the callbacks of `moevlm fit`."""
    turns = _Turns(bare_step(by_hand, batches))
    trainer = Trainer(
        accelerator="gpu" if by_hand.device.type == "cuda" else "cpu",
        devices=1,
        max_steps=WARM_UP + NUM_STEPS + TURN,
        max_epochs=-1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=LOG_EVERY,
        enable_checkpointing=False,
        enable_model_summary=False,
        logger=RunLogger(experiment_name="bench", tracking_uri=uri),
        callbacks=[Telemetry(), Liveness(), DivergenceGuard(), StepProgress(), FlightRecorder(), turns],
        default_root_dir=folder,
    )
    trainer.fit(by_trainer, DataLoader(_Repeated(batches), batch_size=None))
    return 1e3 * turns.bare_seconds / NUM_STEPS, 1e3 * turns.whole_seconds / NUM_STEPS


def small_module() -> VisionLanguageModule:
    """Return a VL-MoE whose step takes some ten milliseconds; a MoE per modality, in three forward passes."""
    moe = partial(MoEFFN, num_experts=8, router=TopKRouter, experts=partial(MLPExperts, hidden_dim=64))
    backbone = VLMoE(
        dim=32, num_heads=2, num_blocks=2, num_vl_blocks=0, hidden_dim=64, image_size=_IMAGE, patch_size=16,
        vocab_size=_VOCABULARY, max_text_len=_TEXT, moe=moe,
    )  # fmt: skip
    return VisionLanguageModule(
        backbone,
        optimizer=partial(AdamW, lr=1e-3),
        schedule=partial(WarmupCosine, total_steps=WARM_UP + NUM_STEPS),
        gradient=GradientStabilisers(clip_norm=1.0),
    )


def quickstart_module() -> VisionLanguageModule:
    """Return the model of conf/quickstart.yaml."""
    moe = partial(
        MoEFFN,
        num_experts=8,
        router=TopKRouter,
        experts=partial(MLPExperts, hidden_dim=256),
        capacity=Capacity(train_factor=1.25, eval_factor=None),
    )
    backbone = VLMoE(
        dim=64, num_heads=4, num_blocks=4, num_vl_blocks=1, hidden_dim=256, image_size=_IMAGE, patch_size=16,
        vocab_size=_VOCABULARY, max_text_len=_TEXT, stabilisers=ModelStabilisers(qk_norm=True), moe=moe,
    )  # fmt: skip
    return VisionLanguageModule(backbone, optimizer=partial(AdamW, lr=3e-3, fused=True))


def sparsity_candidates(device: str = "cpu") -> list[Candidate]:
    """Return a step of a six-block sparse model, MoE in every other block, 8 experts, top-2, and of its dense twin.

    Batches of 64 pairs of 64 patches and 32 words: 6,144 tokens, d = 192, f = 768.
    """
    batches = [pair_batch(64, seed, device) for seed in range(2)]
    return [Candidate(name, bare_step(_wide_module(name == SPARSE).to(device), batches)) for name in (SPARSE, DENSE)]


def measure_sparsity(
    rounds: int, tick: Callable[[], None], device: str = "cpu"
) -> tuple[Ratio, list[dict[str, object]]]:
    """Return how much longer the sparse step takes, and the records."""
    seconds = interleave(sparsity_candidates(device), rounds, tick)
    records: list[dict[str, object]] = [
        {"bench": "step", "impl": name, "median_ms": round(1e3 * statistics.median(times), 3), "rounds": len(times)}
        for name, times in seconds.items()
    ]
    return ratio(seconds, SPARSE, DENSE), records


def _wide_module(is_sparse: bool) -> VisionLanguageModule:
    router = partial(TopKRouter, top_k=2, renormalise=True)
    moe = partial(MoEFFN, num_experts=8, router=router, experts=partial(MLPExperts, hidden_dim=768))
    backbone = LIMoE(
        dim=192, num_heads=6, num_blocks=6, hidden_dim=768, image_size=_IMAGE, patch_size=8, vocab_size=_VOCABULARY,
        max_text_len=_TEXT, moe=moe, is_sparse=is_sparse,
    )  # fmt: skip
    objective = partial(MaskedModelling, weights=TermWeights(text=None, image=None))  # pairs alone
    return VisionLanguageModule(backbone, objective, optimizer=partial(AdamW, lr=1e-3))


def pair_batch(num_samples: int, seed: int, device: str = "cpu") -> Batch:
    """Return random images with texts of full length, on a device."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (num_samples, 3, _IMAGE, _IMAGE), generator=generator, dtype=torch.uint8)
    text = torch.randint(10, _VOCABULARY, (num_samples, _TEXT), generator=generator)
    batch = Batch(images, text, torch.ones_like(text, dtype=torch.bool), tuple(map(str, range(num_samples))))
    return to_device(batch, torch.device(device))


class _Repeated(Dataset[Batch]):
    """The batches, repeated."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return WARM_UP + NUM_STEPS + TURN

    def __getitem__(self, index: int) -> Batch:
        return self.batches[index % len(self.batches)]


class _Turns(Callback):
    """Stops the trainer after every `TURN` steps, after all other callbacks, for as many steps of the bare loop.

    Adds up the seconds of both, between the warm-up and the turn with the last step.
    """

    def __init__(self, step_by_hand: Callable[[], None]) -> None:
        self.bare_seconds = 0.0
        self.whole_seconds = 0.0
        self._step_by_hand = step_by_hand
        self._start = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if trainer.global_step % TURN:
            return
        pause = time.perf_counter()
        for _ in range(TURN):
            self._step_by_hand()
        end = time.perf_counter()
        if WARM_UP < trainer.global_step <= WARM_UP + NUM_STEPS:
            self.whole_seconds += pause - self._start
            self.bare_seconds += end - pause
        self._start = end


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread, and restore their number at the end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the notices, bars and links of the trainers."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
