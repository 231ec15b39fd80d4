"""Auto picks by measurement and load, says which and why, and never falls back in silence."""

import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.dispatch import AutoDispatcher, LoopDispatcher
from lightning_moevlm.model.dispatch.auto import auto as auto_module
from lightning_moevlm.model.dispatch.auto import own_table
from lightning_moevlm.model.dispatch.auto.auto import _rule
from lightning_moevlm.model.dispatch.auto.measure import measure_products, measure_row
from lightning_moevlm.model.dispatch.auto.own_table import GIVEN, measure_once, measure_products_once, own_file
from lightning_moevlm.model.dispatch.auto.timings_table import (
    SHIPPED,
    Case,
    Row,
    Table,
    read_table,
    round_rows,
    write_table,
)
from lightning_moevlm.model.experts import MLPExperts
from lightning_moevlm.model.layers import initialise
from tests.routing import limited, routing_input, top_1_plan

FAST = {"SegmentDispatcher": 2.0, "GroupedDispatcher": 1.0, "PaddedDispatcher": 0.485}


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a machine that may be measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(GIVEN)
    return tmp_path / "cache"


def table(path: Path, *rows: tuple[Case, dict[str, float]]) -> str:
    write_table(Table({"torch": torch.__version__}, tuple(Row(*row) for row in rows), {}, path))
    return str(path)


def case(rows: int = 16, device: str = "cpu", dtype: str = "float32") -> Case:
    return Case(device, dtype, 4, rows, 16, 32, 2)


def logits_of(loads: tuple[int, ...]) -> Tensor:
    """Return the scores of tokens of which so many go to each expert."""
    return torch.eye(len(loads)).repeat_interleave(torch.tensor(loads), dim=0)


def chosen(auto: AutoDispatcher, loads: tuple[int, ...] = (64, 0, 0, 0), width: int = 16) -> tuple[str, str]:
    plan = top_1_plan(logits_of(loads))
    return auto.choose(plan, torch.ones(sum(loads), width), MLPExperts(width, 4, 32)), auto.record()


def test_the_fastest_of_the_nearest_case_runs(tmp_path: Path) -> None:
    # 64 pairs over 4 experts: 16 rows; 1024 rows are 6 doublings away
    slow_grouped = {"SegmentDispatcher": 1.0, "GroupedDispatcher": 2.0}
    auto = AutoDispatcher(table(tmp_path / "t.json", (case(1024), slow_grouped), (case(16), FAST)))
    name, why = chosen(auto)
    assert name == "GroupedDispatcher"
    assert why.startswith(
        "GroupedDispatcher for 4 experts 16 x 32 x 2, 16 rows each, float32: PaddedDispatcher up to 2.00"
    )
    assert "measured at 4 experts 16 x 32 x 2, 16 rows each" in why and "table t.json, row " in why


def test_padded_runs_where_the_loads_are_even_enough(tmp_path: Path) -> None:
    # padded takes 1 / 2.06 of grouped's time at even loads: 3 % faster up to a largest load of twice the mean of 16
    auto = AutoDispatcher(table(tmp_path / "t.json", (case(), FAST)))
    evenly, at_limit, beyond = (16, 16, 16, 16), (32, 16, 8, 8), (33, 15, 8, 8)
    assert [chosen(auto, loads)[0] for loads in (evenly, at_limit, beyond)] == [
        "PaddedDispatcher",
        "PaddedDispatcher",
        "GroupedDispatcher",
    ]
    assert auto.in_use() == ("GroupedDispatcher", "PaddedDispatcher")
    # and the record does not depend on the load
    other = AutoDispatcher(auto.table)
    assert chosen(other, beyond)[1] == auto.record()
    never = AutoDispatcher(table(tmp_path / "slow.json", (case(), FAST | {"PaddedDispatcher": 1.01})))
    assert chosen(never, evenly)[0] == "GroupedDispatcher" and "PaddedDispatcher up to" not in never.record()


@pytest.mark.parametrize(
    ("rows", "segments", "grouped", "padded", "expected"),
    [
        (16, 1.0, 1.2, 2.0, "SegmentDispatcher"),
        (16, 1.03, 1.0, 2.0, "SegmentDispatcher"),  # within 3 %, and as many rows as dim: the least memory
        (16, 1.04, 1.0, 2.0, "GroupedDispatcher"),
        (8, 1.02, 1.0, 2.0, "GroupedDispatcher"),  # fewer rows than dim: grouped needs less
        (8, 1.0, 1.02, 2.0, "GroupedDispatcher"),
        (8, 1.0, 1.04, 2.0, "SegmentDispatcher"),
        (16, 1.0, 1.2, 0.98, "SegmentDispatcher"),  # padded is faster, but within 3 %
        (16, 1.0, 1.2, 0.5, "SegmentDispatcher, PaddedDispatcher up to 1.94 of the mean load"),  # 1 / (1.03 * 0.5)
        (16, 1.02, 1.0, 0.5, "SegmentDispatcher, PaddedDispatcher up to 1.94 of the mean load"),
    ],
)
def test_the_least_memory_runs_of_times_within_3_percent(
    rows: int, segments: float, grouped: float, padded: float, expected: str, tmp_path: Path
) -> None:
    times = {"SegmentDispatcher": segments, "GroupedDispatcher": grouped, "PaddedDispatcher": padded}
    auto = AutoDispatcher(table(tmp_path / "t.json", (case(rows), times)))
    chosen(auto, loads=(4 * rows, 0, 0, 0))
    assert auto.choices() == {str(case(rows)): expected}
    by_memory = min(times, key=times.__getitem__) not in expected
    assert ("least memory within 3%; " in auto.record()) is by_memory


def test_the_loads_are_those_of_the_pairs_that_run(tmp_path: Path) -> None:
    # a capacity of 1.0 cuts 34 pairs of one expert to 16: 16, 10, 10, 10 are a largest load of 16 / 11.5 = 1.39
    auto = AutoDispatcher(table(tmp_path / "t.json", (case(), FAST | {"PaddedDispatcher": 0.68})))
    plan = top_1_plan(logits_of((34, 10, 10, 10)))
    tokens_TD, experts = torch.ones(64, 16), MLPExperts(16, 4, 32)
    assert auto.choose(plan, tokens_TD, experts) == "GroupedDispatcher"
    assert auto.choose(limited(plan, 1.0), tokens_TD, experts) == "PaddedDispatcher"


def test_dispatchers_that_cannot_run_a_case_are_named(tmp_path: Path) -> None:
    auto = AutoDispatcher(table(tmp_path / "t.json", (case(), FAST | {"PaddedDispatcher": 1.0})))
    name, why = chosen(auto, width=6)
    assert name == "SegmentDispatcher"
    assert "GroupedDispatcher passed over: width 6 in torch.float32: widths must be multiples of 4" in why


def test_without_a_measurement_a_rule_decides(tmp_path: Path) -> None:
    auto = AutoDispatcher(table(tmp_path / "t.json", (case(device="cuda"), FAST), (case(dtype="bfloat16"), FAST)))
    name, why = chosen(auto)
    assert name == "SegmentDispatcher" and "no measurement for cpu in float32" in why


def test_on_a_gpu_the_rule_is_what_was_faster_where_it_was_measured() -> None:
    theirs, able = "transformers, grouped_mm", ["SegmentDispatcher", "GroupedDispatcher", "PaddedDispatcher"]
    ours = _rule(case(device="cuda"), able)
    assert (ours.at(1.0), ours.at(2.0)) == ("PaddedDispatcher", "GroupedDispatcher")
    assert _rule(case(device="cuda")._replace(beside=theirs), [*able, theirs]).at(1.0) == theirs
    assert _rule(case()._replace(beside=theirs), [*able, theirs]).at(1.0) == "SegmentDispatcher"
    eager = "transformers, eager"  # 4.5 times as slow as its grouped_mm
    assert _rule(case(device="cuda")._replace(beside=eager), [*able, eager]).at(2.0) == "GroupedDispatcher"


def test_a_case_is_measured_once_per_machine(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Case] = []

    def measure(of: Case, *layer: object) -> Row:
        measured.append(of)
        return Row(of, FAST)

    monkeypatch.setattr(auto_module, "measure_row", measure)
    auto = AutoDispatcher()
    assert chosen(auto) == chosen(auto) == chosen(AutoDispatcher())
    assert chosen(auto)[0] == "GroupedDispatcher" and f"table {own_file().name}" in auto.record()
    assert measured == [case()]
    chosen(auto, loads=(128, 0, 0, 0))
    assert [row.case.rows for row in read_table(own_file()).rows] == [16, 32]


def test_an_evaluation_measures_what_a_training_would(cache_folder: Path) -> None:
    experts, auto = MLPExperts(16, 4, 32), AutoDispatcher()
    with torch.inference_mode():
        auto.choose(top_1_plan(logits_of((16, 16, 16, 16))), torch.ones(64, 16), experts)
    (row,) = read_table(own_file()).rows
    assert row.case == case() and row.milliseconds.keys() == FAST.keys() and "table dispatch-" in auto.record()


def test_processes_that_meet_a_case_at_once_choose_by_one_measurement(cache_folder: Path) -> None:
    measured: list[float] = []

    def measure(milliseconds: float) -> Row:
        measured.append(milliseconds)
        time.sleep(0.1)  # so that all have asked before the first has written
        return Row(case(), {"SegmentDispatcher": milliseconds})

    def ask(number: int) -> Table:
        return measure_once(case(), lambda: measure(float(number)))[0]

    with ThreadPoolExecutor(4) as pool:
        tables = list(pool.map(ask, range(1, 5)))
    assert len(measured) == 1 and all(each.rows == tables[0].rows for each in tables)


def test_another_cpu_of_the_same_name_has_another_table(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = own_file()
    assert one.is_relative_to(cache_folder)
    monkeypatch.setattr(own_table, "_cpu", lambda: {"model name": "AMD EPYC", "model": "17"})
    two = own_file()
    monkeypatch.setattr(own_table, "_cpu", lambda: {"model name": "AMD EPYC", "model": "1"})
    assert len({one, two, own_file()}) == 3


def test_a_version_with_other_cases_has_another_table(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two versions run side by side: a pinned study, and the newest for everything else."""
    own = own_file()
    monkeypatch.setattr(own_table.Case, "_fields", (*Case._fields, "more"))
    assert own_file() != own


def test_a_cache_that_cannot_be_written_leaves_the_shipped_table_and_says_so(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no folder can be made in it, by root neither
    _, why = chosen(AutoDispatcher())
    assert "table measured_cpu.json" in why and "cannot be written" in why and "the shipped table" in why
    assert measure_products_once(lambda: {"float32": 0.3}) == {}


def test_the_table_of_the_environment_is_chosen_by_as_it_is(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(GIVEN, table(tmp_path / "given.json", (case(1024), FAST)))
    assert "table given.json" in chosen(AutoDispatcher())[1]
    assert measure_products_once(lambda: {"float32": 0.3}) == {} and not cache_folder.exists()


def test_measuring_leaves_training_as_it_was(cache_folder: Path) -> None:
    experts = MLPExperts(16, 4, 32)
    auto = AutoDispatcher()
    plan, tokens_TD = top_1_plan(logits_of((40, 8, 8, 8))), torch.ones(64, 16)
    before = torch.get_rng_state()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each, lambda each: each):  # type: ignore[func-returns-value]
        auto.choose(plan, tokens_TD, experts)
    assert torch.equal(before, torch.get_rng_state()) and not saved
    assert all(parameter.grad is None for parameter in experts.parameters())
    (row,) = read_table(own_file()).rows
    assert row.case == case() and row.milliseconds.keys() == FAST.keys() and min(row.milliseconds.values()) > 0


def test_autocast_is_measured_as_it_trains(cache_folder: Path) -> None:
    experts, seen = MLPExperts(16, 4, 32), set()

    class Loop(LoopDispatcher):
        def run_pairs(self, *arguments) -> Tensor:  # type: ignore[no-untyped-def]
            seen.add((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
            return super().run_pairs(*arguments)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        measure_row(
            case(dtype="bfloat16"), top_1_plan(torch.zeros(64, 4)), torch.ones(64, 16), experts, {"L": Loop()}, 1
        )
    assert seen == {(True, torch.bfloat16)}


def test_products_are_measured_once(cache_folder: Path) -> None:
    speeds = measure_products_once(measure_products)
    assert speeds.keys() == {"float32", "bfloat16"} and min(speeds.values()) > 0
    assert measure_products_once(lambda: {"float32": 0.0}) == speeds == read_table(own_file()).products


def test_the_shipped_table_says_where_it_comes_from() -> None:
    shipped = read_table(SHIPPED)
    assert shipped.source.keys() >= {"torch", "processor", "threads", "date", "command"}
    assert {row.case.device for row in shipped.rows} == {"cpu"}
    assert all(time > 0 for row in shipped.rows for time in row.milliseconds.values())


def test_a_choice_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    auto = AutoDispatcher(table(tmp_path / "t.json", (case(), FAST)))
    with caplog.at_level(logging.INFO, logger="lightning_moevlm.model.dispatch"):
        assert chosen(auto) == chosen(auto)
    assert len(caplog.records) == 1


def test_a_file_that_is_not_a_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="moevlm bench dispatch"):
        AutoDispatcher(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text(json.dumps({"rows": [{"case": {}}]}))
    with pytest.raises(UserError, match="is not a table of dispatcher measurements"):
        AutoDispatcher(str(tmp_path / "bad.json"))


def test_rows_are_rounded_so_that_similar_batches_are_one_case() -> None:
    # 1000 / 8 = 125, 2^7 = 128; 3 / 8 and 0 are one row
    assert [round_rows(pairs, 8) for pairs in (1000, 3, 0)] == [128, 1, 1]


def test_auto_gives_what_the_loop_gives(tmp_path: Path) -> None:
    experts = MLPExperts(16, 4, 32)
    initialise(experts, seed=0, std=0.3)
    tokens_TD = routing_input(64, 16).tokens_TD
    logits_TE = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    for plan in (top_1_plan(logits_TE), limited(top_1_plan(logits_TE), 0.5)):
        auto = AutoDispatcher(table(tmp_path / "t.json", (case(), FAST)))
        torch.testing.assert_close(auto(plan, tokens_TD, experts), LoopDispatcher()(plan, tokens_TD, experts))
