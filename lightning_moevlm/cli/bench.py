"""`moevlm bench`: times layers, dispatchers, whole steps and data on this machine, beside other packages.

Typed functions; the command line makes options of their arguments and help of their docstrings. Imports are local.
The process keeps its memory and its threads wait as in a training (`cli/main.py`).
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from lightning_moevlm.cli.output import console, show
from lightning_moevlm.common.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress
    from rich.table import Table

    from lightning_moevlm.bench.goals import Verdict

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is loaded: its profiler announces each start

Peers = Literal["all", "none", "transformers", "st-moe"]
Device = Literal["cpu", "cuda"]
DType = Literal["float32", "bfloat16"]
Size = Literal["small", "large"]
Records = list[dict[str, object]]
_TIMES = {"impl": "", "median_ms": "median ms"}


def layer(
    only: str | None = None,
    rounds: int = 9,
    peers: Peers = "all",
    threads: int | None = None,
    device: Device = "cpu",
    json: str | None = None,
) -> int:
    """Time MoE layers, forward and backward, beside a dense twin, the bare matrix products and other packages.

    Args:
        only: Filter of cases, e.g. E=8 or E=8,act=gelu,skew=zipf.
        rounds: Interleaved rounds; each times every candidate once.
        peers: Packages to compare with, if they are installed (extra `peers`).
        threads: Threads of torch; by default one per core.
        device: Device of the layers; goals are checked on the CPU only.
        json: Write one record per case and candidate to this file instead of the tables; - is standard output.
    """
    from rich.console import Group

    from lightning_moevlm.bench.cases import LAYER_CASES, select
    from lightning_moevlm.bench.goals import layer_verdicts
    from lightning_moevlm.bench.layer import make_candidates, run_case
    from lightning_moevlm.bench.peers import missing_peers

    _prepare(rounds, threads, device)
    cases = select(LAYER_CASES, only)
    for package in missing_peers(peers):
        _note(f"{package} is not installed and left out; install it with pip install 'lightning-moevlm[peers]'")
    results = []
    with _progress() as progress:
        for case in cases:
            candidates = make_candidates(case, peers, device)
            task = progress.add_task(f"{case.shape} {case.skew}", total=(rounds + 1) * len(candidates))
            results.append(run_case(case, rounds, candidates, lambda task=task: progress.advance(task), device))  # type: ignore[misc]
    columns = _TIMES | {"ratio_dense": "over dense", "ratio_gemm": "over GEMMs", "peak_mib": "peak MiB"}
    titles = [f"{result.case.shape}, {result.case.skew} load" for result in results]
    tables = [_table(result.records(), columns, title) for result, title in zip(results, titles, strict=True)]
    records = [record for result in results for record in result.records()]
    return _finish(Group(*tables), records, layer_verdicts(results) if device == "cpu" else [], json)


def dispatch(
    rounds: int = 9, table: str | None = None, threads: int | None = None, growth: bool = True, json: str | None = None
) -> int:
    """Measure every dispatcher over a grid of cases and add them to the table that AutoDispatcher chooses by.

    Args:
        rounds: Interleaved rounds; each times every candidate once.
        table: File to add to; by default this machine's own file for this number of threads, in the cache folder.
        threads: Threads of torch; by default one per core.
        growth: Also time dispatch alone over growing T and E.
        json: Write the records of dispatch alone to this file instead of the tables; - is standard output.
    """
    from pathlib import Path

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
            task = progress.add_task("dispatch alone", total=(rounds + 1) * (1 + len(growth_shapes())))
            alone = measure_growth(rounds, lambda: progress.advance(task))
    add(target, rows, products)
    if json is None:
        times: Records = [{"case": row.case, **row.milliseconds} for row in rows]
        names = dict(zip(times[0], times[0], strict=True))
        console().print(_table(times, names, "forward and backward, ms, even loads"))
        _note(", ".join(f"{dtype} products {speed:.3g} TFLOP/s" for dtype, speed in products.items()))
    if alone is not None:
        named: Records = [{**each, "impl": name} for each, name in zip(alone.records(), alone.shapes, strict=True)]
        listing = _table(named, _TIMES | {"ratio_dense": "over the dense FFN at T=2048"}, _setting())
        _finish(listing, alone.records(), dispatch_verdicts(alone), json)
    _note(f"wrote {target}, by which AutoDispatcher chooses")
    return 0


def step(
    rounds: int = 5,
    beside: int | None = None,
    threads: int | None = None,
    device: Device = "cpu",
    json: str | None = None,
) -> int:
    """Time whole training steps: the cost of Lightning, telemetry and MLflow, and sparse over dense.

    Args:
        rounds: Interleaved rounds; each trains 110 steps of a small model in each way, and one step of a larger one.
        beside: Number of busy processes. If given, times a step of the quickstart model alone and while they run.
        threads: Threads of torch; by default one per core.
        device: Device of the models; goals are checked on the CPU only.
        json: Write one record per variant to this file instead of the tables; - is standard output.
    """
    if beside is not None:
        return _step_beside(beside, rounds, threads, device, json)
    from lightning_moevlm.bench.goals import step_verdicts
    from lightning_moevlm.bench.training_step import measure_overhead, measure_sparsity

    _prepare(rounds, threads, device)
    with _progress() as progress:
        trained = progress.add_task("bare loop and Trainer", total=rounds)
        times = measure_overhead(rounds, lambda: progress.advance(trained), device)
        wide = progress.add_task("sparse and dense", total=2 * (rounds + 1))
        sparsity, wide_records = measure_sparsity(rounds, lambda: progress.advance(wide), device)
    records = [*times.records(), *wide_records]
    verdicts = step_verdicts(times, sparsity) if device == "cpu" else []
    return _finish(_table(records, _TIMES, _setting()), records, verdicts, json)


def _step_beside(busy: int, rounds: int, threads: int | None, device: Device, json: str | None) -> int:
    import torch

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
    if json is None:
        _note(
            f"A process of T threads on C cores beside N busy threads gets C T / (T + N) cores, at most T; here T = "
            f"{times.threads}, C = {times.cores}, N = {busy}. Over fair share: time over that of the faster quiet row, "
            "scaled to those cores."
        )
    columns = _TIMES | {"fair_cores": "fair cores", "over_fair_share": "over fair share"}
    listing = _table(times.records(), columns, f"step of the quickstart's model, torch {torch.__version__}")
    return _finish(listing, times.records(), load_verdicts(times), json)


def data(rounds: int = 5, root: str | None = None, json: str | None = None) -> int:
    """Time reading, parsing, decoding and whole loaders, beside decoding alone and plain WebDataset with Pillow.

    Args:
        rounds: Interleaved rounds; each measures every case once.
        root: Folder of a set with jpg and txt; by default one of 256 px images is drawn for the bench and removed.
        json: Write one record per thing timed to this file instead of the tables; - is standard output.
    """
    import tempfile
    from pathlib import Path

    from lightning_moevlm.bench.data import data_loading as bench
    from lightning_moevlm.bench.goals import data_verdicts

    _prepare(rounds, threads=1)
    with tempfile.TemporaryDirectory() as folder:
        if root is None:
            bench.build_set(Path(folder) / "scenes")
        timed = bench.list_timed(bench.open_set(Path(root) if root else Path(folder) / "scenes"), bench.SIZES)
        with _progress() as progress:
            task = progress.add_task("loaders and their stages", total=(rounds + 1) * len(timed))
            times = bench.measure(timed, rounds, lambda: progress.advance(task))
    columns = {"impl": "", "samples_per_s": "samples/s", "share_of_ceiling": "share of decoding only"}
    listing = _table(times.records(), columns, "medians over rounds")
    return _finish(listing, times.records(), data_verdicts(times, bench.SIZES, bench.WORKERS), json)


def adopted(
    rounds: int = 9,
    size: Size | None = None,
    sequences: int | None = None,
    length: int | None = None,
    dtype: DType | None = None,
    threads: int | None = 1,
    device: Device = "cpu",
    json: str | None = None,
) -> int:
    """Time what observing adds to a step of a model of Hugging Face, and our dispatchers beside its own back-ends.

    Args:
        rounds: Interleaved rounds; each times every candidate once.
        size: The model: width 256 with 16 experts, or width 2048 with 64; by default small on the CPU, large on cuda.
        sequences: Texts of a batch; by default 4 for the small model, 8 for the large one.
        length: Tokens of each; by default 256 or 2048.
        dtype: Of weights and computation; by default float32 on the CPU, bfloat16 on cuda.
        threads: Threads of torch; a single one is timed by its CPU time, which other processes do not change.
        device: Device of the models.
        json: Write one record per candidate to this file instead of the table; - is standard output.
    """
    from lightning_moevlm.bench.adopted import BACKENDS, DISPATCHERS, SIZES, measure_adopted, refuse_missing
    from lightning_moevlm.bench.goals import observing_verdicts

    refuse_missing()
    _prepare(rounds, threads, device)
    chosen = SIZES[size or ("large" if device == "cuda" else "small")]
    chosen = chosen._replace(
        sequences=chosen.sequences if sequences is None else sequences,
        length=chosen.length if length is None else length,
    )
    if chosen.sequences < 1 or chosen.length < 1:
        raise UserError(f"--sequences is {chosen.sequences} and --length {chosen.length}: give at least 1 of each")
    kind = dtype or ("bfloat16" if device == "cuda" else "float32")
    with _progress() as progress:
        total = (2 * len(BACKENDS) + len(DISPATCHERS)) * (rounds + 1)
        task = progress.add_task("plain, observed and dispatched", total=total)
        times = measure_adopted(rounds, chosen, lambda: progress.advance(task), device, kind)
    columns = _TIMES | {"ratio": "ratio", "over": "over", "peak_mib": "peak MiB", "plans_mib": "plans MiB"}
    listing = _table(times.records(), columns, _setting(kind))
    listing.caption = times.finding()
    return _finish(listing, times.records(), observing_verdicts(times), json, kind)


COMMANDS: dict[str, Callable[..., int]] = {
    "layer": layer,
    "dispatch": dispatch,
    "step": step,
    "data": data,
    "adopted": adopted,
}


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


def _table(records: Sequence[Mapping[str, object]], columns: Mapping[str, str], title: str) -> "Table":
    """Return a table of some fields of records, under these headings."""
    from rich.table import Table

    table = Table(title=title)
    for heading in columns.values():
        table.add_column(heading, justify="right" if table.columns else "left")
    for record in records:
        values = ("" if record[key] is None else record[key] for key in columns)
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
    return table


def _finish(
    listing: "RenderableType",
    records: Records,
    verdicts: "Sequence[Verdict]",
    json: str | None,
    dtype: DType = "float32",
) -> int:
    """Print a listing and its goals, or write the records."""
    from rich.table import Table

    show(listing, records, json)
    if json is None and verdicts:
        goals = Table("goal", "figure", "allowed", "", title="goals", caption=_setting(dtype))
        for each in verdicts:
            allowed = f"{'>=' if each.at_least else '<='} {each.goal:.2f}"
            goals.add_row(each.what, f"{each.figure:.2f}", allowed, "met" if each.met else "[red]missed[/]")
        console().print(goals)
    return 0


def _setting(dtype: DType = "float32") -> str:
    import torch

    from lightning_moevlm.bench.timing import wall_clock

    threads = f"{torch.get_num_threads()} threads by the wall clock" if wall_clock() else "1 thread by its CPU time"
    gpu = f"on {torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{'fp32' if dtype == 'float32' else 'bf16'}, {threads}, torch {torch.__version__}"


def _note(text: str) -> None:
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)
