"""`moevlm bench`: time layers, dispatch, whole steps and data on this machine, peers beside.

Plain typed functions; the command line makes options of their arguments and help of their docstrings. What they need is
imported when they run. The process keeps its memory and its threads wait as in a training (`cli/main.py`).
"""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from lightning_moevlm.cli.output import console, show
from lightning_moevlm.common.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress

    from lightning_moevlm.bench.data_loading import DataTimes
    from lightning_moevlm.bench.goals import Verdict
    from lightning_moevlm.bench.layer import LayerResult

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is loaded: its profiler announces each start

Peers = Literal["all", "none", "transformers", "st-moe"]
Device = Literal["cpu", "cuda"]


def layer(
    only: str | None = None,
    rounds: int = 9,
    peers: Peers = "all",
    threads: int | None = None,
    device: Device = "cpu",
    json: str | None = None,
) -> int:
    """Time whole MoE layers, forward and backward, against a dense twin, the pure expert products and peers.

    Args:
        only: Cases that agree with it, e.g. E=8 or E=8,act=gelu,skew=zipf.
        rounds: Interleaved rounds; each times every candidate once.
        peers: Packages to compare with, where they are installed (extra `peers`).
        threads: Threads of torch; by default one per core.
        device: Device of the layers; goals are checked on the CPU only.
        json: Write one record per case and candidate to this file instead of the tables; - is standard output.
    """
    from lightning_moevlm.bench.cases import LAYER_CASES, select
    from lightning_moevlm.bench.goals import layer_verdicts
    from lightning_moevlm.bench.layer import make_candidates, run_case
    from lightning_moevlm.bench.peers import missing_peers

    _prepare(rounds, threads, device)
    cases = select(LAYER_CASES, only)
    for package in missing_peers(peers):
        _note(f"{package} is not installed and left out: pip install 'lightning-moevlm[peers]'")
    results = []
    with _progress() as progress:
        for case in cases:
            candidates = make_candidates(case, peers, device)
            task = progress.add_task(f"{case.shape} {case.skew}", total=(rounds + 1) * len(candidates))
            results.append(run_case(case, rounds, candidates, lambda task=task: progress.advance(task), device))  # type: ignore[misc]
    records = [record for result in results for record in result.records()]
    _show_layer(results, layer_verdicts(results) if device == "cpu" else [], records, json)
    return 0


def dispatch(
    rounds: int = 9, table: str | None = None, threads: int | None = None, growth: bool = True, json: str | None = None
) -> int:
    """Measure every dispatcher over a grid of cases and add them to the table that AutoDispatcher chooses by.

    Args:
        rounds: Interleaved rounds; each times every candidate once.
        table: File to add to; by default this machine's own for so many threads, in the cache folder.
        threads: Threads of torch; by default one per core.
        growth: Also time dispatch alone over growing T and E.
        json: Write the records of dispatch alone to this file instead of the tables; - is standard output.
    """
    from pathlib import Path

    from rich.table import Table

    from lightning_moevlm.bench.dispatch_scaling import growth_shapes, measure_growth
    from lightning_moevlm.bench.dispatcher_timings import grid, measure_case
    from lightning_moevlm.bench.goals import dispatch_verdicts
    from lightning_moevlm.model.dispatch.auto.measure import measure_products
    from lightning_moevlm.model.dispatch.auto.own_table import add, own_file

    _prepare(rounds, threads)
    target = Path(table) if table else own_file()
    alone = None
    with _progress() as progress:
        rows = [measure_case(case, rounds) for case in progress.track(grid(), description="dispatchers")]
        products = measure_products()
        if growth:
            step = progress.add_task("dispatch alone", total=(rounds + 1) * (1 + len(growth_shapes())))
            alone = measure_growth(rounds, lambda: progress.advance(step))
    add(target, rows, products)
    if json is None:
        listing = Table(
            "case", *rows[0].milliseconds, title="forward and backward, ms, evenly loaded; the fastest runs"
        )
        for row in rows:
            listing.add_row(str(row.case), *(f"{time:.2f}" for time in row.milliseconds.values()))
        console().print(listing)
        _note(", ".join(f"{dtype} products {speed:.3g} TFLOP/s" for dtype, speed in products.items()))
    if alone is not None:
        shown = Table("dispatch alone", "ms", "of the dense FFN at T=2048", title=_setting())
        for record, name in zip(alone.records(), alone.shapes, strict=True):
            share = f"{record['ratio_dense']:.1%}" if record["ratio_dense"] is not None else ""
            shown.add_row(name.removeprefix("dispatch alone "), f"{record['median_ms']:.2f}", share)
        show(shown, alone.records(), json)
        if json is None:
            _show_verdicts(dispatch_verdicts(alone))
    _note(f"wrote {target}: AutoDispatcher chooses by it")
    return 0


def step(
    rounds: int = 5,
    beside: int | None = None,
    threads: int | None = None,
    device: Device = "cpu",
    json: str | None = None,
) -> int:
    """Time whole training steps: what Lightning, telemetry and MLflow add to the bare loop, and sparse over dense.

    Args:
        rounds: Interleaved rounds; each trains 110 steps of a small model in each way, and one step of a larger one.
        beside: Busy processes to time a step of the quickstart's model beside, instead; also without them.
        threads: Threads of torch; by default one per core.
        device: Device of the models; goals are checked on the CPU only.
        json: Write one record per way to train to this file instead of the tables; - is standard output.
    """
    if beside is not None:
        return _step_beside(beside, rounds, threads, device, json)
    from rich.table import Table

    from lightning_moevlm.bench.goals import step_verdicts
    from lightning_moevlm.bench.training_step import measure_overhead, measure_sparsity

    _prepare(rounds, threads, device)
    with _progress() as progress:
        trained = progress.add_task("bare loop and Trainer", total=rounds)
        times = measure_overhead(rounds, lambda: progress.advance(trained), device)
        wide = progress.add_task("sparse and dense", total=2 * (rounds + 1))
        sparsity, wide_records = measure_sparsity(rounds, lambda: progress.advance(wide), device)
    records = [*times.records(), *wide_records]
    table = Table("step", "median ms", title=_setting())
    for record in records:
        table.add_row(str(record["impl"]), f"{record['median_ms']:.2f}")
    show(table, records, json)
    if json is None and device == "cpu":
        _show_verdicts(step_verdicts(times, sparsity))
    return 0


def data(rounds: int = 5, root: str | None = None, json: str | None = None) -> int:
    """Time reading, parsing, decoding and whole loaders, beside decoding alone and plain WebDataset with Pillow.

    Args:
        rounds: Interleaved rounds; each does everything once.
        root: Folder of a set with jpg and txt; by default one of 256 px images is drawn for the bench and removed.
        json: Write one record per thing timed to this file instead of the tables; - is standard output.
    """
    import tempfile
    from pathlib import Path

    from lightning_moevlm.bench import data_loading as bench

    _prepare(rounds, threads=1)
    with tempfile.TemporaryDirectory() as folder:
        if root is None:
            bench.build_set(Path(folder) / "scenes")
        timed = bench.list_timed(bench.open_set(Path(root) if root else Path(folder) / "scenes"), bench.SIZES)
        with _progress() as progress:
            task = progress.add_task("loaders and their stages", total=(rounds + 1) * len(timed))
            times = bench.measure(timed, rounds, lambda: progress.advance(task))
    _show_data(times, json)
    return 0


COMMANDS: dict[str, Callable[..., int]] = {"layer": layer, "dispatch": dispatch, "step": step, "data": data}


def _prepare(rounds: int, threads: int | None, device: Device = "cpu") -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device is cuda, but torch {torch.__version__} sees no CUDA device; leave it out here")
    if rounds < 1:
        raise UserError(f"--rounds is {rounds}: give at least 1, or 9 for ratios that repeat within some percent")
    if threads is not None and threads < 1:
        raise UserError(f"--threads is {threads}: give at least 1")
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)


def _progress() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _step_beside(busy: int, rounds: int, threads: int | None, device: Device, json: str | None) -> int:
    import torch
    from rich.table import Table

    from lightning_moevlm.bench.busy_machine import measure_load, stepper_processes
    from lightning_moevlm.bench.goals import load_verdicts

    if busy < 1:
        raise UserError(f"--beside is {busy}: give at least 1 busy process, or leave it out")
    if device != "cpu":
        raise UserError(f"--beside times threads of the CPU, but --device is {device}: leave one of the two out")
    _prepare(rounds, threads)
    num_threads = torch.get_num_threads()
    with _progress() as progress:
        task = progress.add_task(f"quiet and beside {busy} busy processes", total=4 * rounds)
        with stepper_processes(num_threads) as steppers:
            times = measure_load(steppers, num_threads, busy, rounds, lambda: progress.advance(task))
    title = f"fp32, {num_threads} threads on {times.cores} cores by the wall clock, torch {torch.__version__}"
    table = Table("step of the quickstart's model", "median ms", "fair cores", "over fair share", title=title)
    records = times.records()
    for record in records:
        name = str(record["impl"])
        table.add_row(
            name, f"{record['median_ms']:.1f}", f"{times.fair_cores(name):.2f}", f"{record['over_fair_share']:.2f}"
        )
    show(table, records, json)
    if json is None:
        _note(
            f"A process of T threads on C cores beside N busy threads gets C T / (T + N) cores, at most T; here T = "
            f"{times.threads}, C = {times.cores}, N = {busy}. Over fair share: time over that of the faster quiet row, "
            "scaled to those cores."
        )
        _show_verdicts(load_verdicts(times))
    return 0


def _show_layer(
    results: "Sequence[LayerResult]",
    verdicts: "Sequence[Verdict]",
    records: list[dict[str, object]],
    json: str | None,
) -> None:
    from rich.console import Group
    from rich.table import Table

    from lightning_moevlm.bench.candidates import DENSE, GEMM
    from lightning_moevlm.bench.timing import ratio

    tables = []
    for result in results:
        table = Table(title=f"{result.case.shape}, {result.case.skew} load", caption=_setting())
        for title in (
            "candidate",
            "median ms",
            "over dense, best",
            "med",
            "over GEMMs, best",
            "med",
            "peak MiB",
            "dense",
        ):
            table.add_column(title, justify="left" if title == "candidate" else "right")
        for record in result.records():
            name = str(record["impl"])
            dense, gemm = ratio(result.seconds, name, DENSE), ratio(result.seconds, name, GEMM)
            peak = result.peaks.get(name)
            shown = ("", "") if peak is None else (f"{peak:.1f}", f"{peak / result.peaks[DENSE]:.2f}")
            times = (f"{value:.2f}" for value in (*dense, *gemm))
            table.add_row(name, f"{record['median_ms']:.1f}", *times, *shown)
        tables.append(table)
    show(Group(*tables), records, json)
    if json is None:
        _show_verdicts(verdicts)


def _show_data(times: "DataTimes", json: str | None) -> None:
    from rich.console import Group
    from rich.table import Table

    from lightning_moevlm.bench import data_loading as bench
    from lightning_moevlm.bench.goals import data_verdicts

    stages = Table("one process", title="samples/s, median over rounds")
    for size in bench.SIZES:
        stages.add_column(f"{size} px", justify="right")
    loaders = Table("", title="samples/s of whole loaders; ceiling: decoding alone, in as many processes")
    for title in ("ceiling", bench.LOADER, "of the ceiling", bench.PLAIN, "loader over it"):
        loaders.add_column(title, justify="right")
    for what in (bench.READ, bench.PARSE, bench.TOKENISE):
        stages.add_row(what, f"{times.rate(what):.0f}", *[""] * (len(bench.SIZES) - 1))
    for what in (bench.DECODE, bench.RESIZE, bench.COLLATE):
        stages.add_row(what, *(f"{times.rate(bench.at(what, size)):.0f}" for size in bench.SIZES))
    stages.add_row(
        "decode only: the ceiling", *(f"{times.rate(bench.at(bench.CEILING, s, 0)):.0f}" for s in bench.SIZES)
    )
    for size in bench.SIZES:
        for workers in bench.WORKERS:
            ceiling, ours, plain = (
                bench.at(each, size, workers) for each in (bench.CEILING, bench.LOADER, bench.PLAIN)
            )
            loaders.add_row(
                f"{size} px, {workers} workers",
                *(f"{times.rate(ceiling):.0f}", f"{times.rate(ours):.0f}", f"{times.share(ours, ceiling):.0%}"),
                *(f"{times.rate(plain):.0f}", f"{times.share(ours, plain):.2f}"),
            )
    pace = f"consumer of {1e3 * bench.CONSUMER_SECONDS:.0f} ms per batch of {bench.BATCH_SIZE}, {bench.SIZES[0]} px"
    fed = Table(pace, "samples/s", "of a fixed batch", title="keeping a training fed")
    fed.add_row(bench.FIXED, f"{times.rate(bench.FIXED):.0f}", "")
    for workers in bench.WORKERS:
        name = bench.at(bench.FED, bench.SIZES[0], workers)
        fed.add_row(f"{workers} workers", f"{times.rate(name):.0f}", f"{times.share(name, bench.FIXED):.0%}")
    show(Group(stages, loaders, fed), times.records(), json)
    if json is None:
        _show_verdicts(data_verdicts(times, bench.SIZES, bench.WORKERS))


def _show_verdicts(verdicts: "Sequence[Verdict]") -> None:
    from rich.table import Table

    table = Table("goal", "figure", "allowed", "", title="goals")
    for each in verdicts:
        allowed = f"{'>=' if each.at_least else '<='} {each.goal:.2f}"
        table.add_row(each.what, f"{each.figure:.2f}", allowed, "met" if each.met else "[red]missed[/]")
    if verdicts:
        console().print(table)


def _setting() -> str:
    import torch

    from lightning_moevlm.bench.timing import wall_clock

    threads = f"{torch.get_num_threads()} threads by the wall clock" if wall_clock() else "1 thread by its CPU time"
    gpu = f"on {torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}fp32, {threads}, torch {torch.__version__}, glibc allocator keeps its memory"


def _note(text: str) -> None:
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)
