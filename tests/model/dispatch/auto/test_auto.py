"""Auto picks by measurement, says which and why, and never falls back in silence."""

import json
import logging
from pathlib import Path

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.dispatch import AutoDispatcher, LoopDispatcher
from lightning_moevlm.model.dispatch.auto.timings_table import (
    SHIPPED,
    Case,
    Row,
    measurements,
    read_measured,
    rounded_rows,
    user_file,
    write_measured,
)
from lightning_moevlm.model.experts import MLPExperts
from lightning_moevlm.model.layers import initialise
from tests.routing import limited, routing_input, top_1_plan

FAST = {"SegmentDispatcher": 2.0, "GroupedDispatcher": 1.0, "PaddedDispatcher": 0.5}


@pytest.fixture(autouse=True)
def no_user_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


PEAKS = {"SegmentDispatcher": 7.0, "GroupedDispatcher": 10.0, "PaddedDispatcher": 20.0}


def table(path: Path, *rows: tuple[Case, dict[str, float]]) -> str:
    write_measured(path, {"torch": torch.__version__}, [Row(*row, PEAKS) for row in rows])
    return str(path)


def case(rows: int = 16, device: str = "cpu", dtype: str = "float32", bounded: bool = False) -> Case:
    return Case(device, dtype, 4, rows, 16, 32, bounded)


def chosen(auto: AutoDispatcher, bounded: bool = False, width: int = 16) -> tuple[str, str]:
    plan = top_1_plan(torch.zeros(64, 4))
    return auto.choose(limited(plan, 1.0) if bounded else plan, torch.ones(64, width), MLPExperts(width, 4, 32))


def test_the_fastest_of_the_nearest_case_runs(tmp_path: Path) -> None:
    # 64 pairs over 4 experts: 16 rows; 1024 rows are 6 doublings away
    slow_grouped = {"SegmentDispatcher": 1.0, "GroupedDispatcher": 2.0}
    auto = AutoDispatcher(table(tmp_path / "t.json", (case(1024), slow_grouped), (case(16), FAST)))
    name, why = chosen(auto)
    assert name == "GroupedDispatcher"
    assert "measured at 4 experts 16 x 32, 16 rows each" in why and "PaddedDispatcher passed over: no capacity" in why
    assert chosen(auto, bounded=True)[0] == "PaddedDispatcher"
    assert "GroupedDispatcher for 4 experts" in auto.record() and "PaddedDispatcher for" in auto.record()


def test_of_equals_the_leanest_runs(tmp_path: Path) -> None:
    # 4 % slower cannot be told from the fastest, 6 % can
    equal = {"SegmentDispatcher": 1.04, "GroupedDispatcher": 1.0, "PaddedDispatcher": 1.02}
    name, why = chosen(AutoDispatcher(table(tmp_path / "equal.json", (case(), equal))))
    assert name == "SegmentDispatcher" and "SegmentDispatcher 1.04 ms 7 MiB, GroupedDispatcher 1 ms 10 MiB" in why
    slower = {"SegmentDispatcher": 1.06, "GroupedDispatcher": 1.0, "PaddedDispatcher": 1.02}
    assert chosen(AutoDispatcher(table(tmp_path / "slower.json", (case(), slower))))[0] == "GroupedDispatcher"


def test_who_cannot_run_a_case_is_passed_over_by_name(tmp_path: Path) -> None:
    auto = AutoDispatcher(table(tmp_path / "t.json", (case(), FAST)))
    name, why = chosen(auto, width=6)
    assert name == "SegmentDispatcher"
    assert "GroupedDispatcher passed over: width 6 in torch.float32: widths must be multiples of 4" in why


def test_without_a_measurement_a_rule_decides(tmp_path: Path) -> None:
    auto = AutoDispatcher(table(tmp_path / "t.json", (case(device="cuda"), FAST), (case(dtype="bfloat16"), FAST)))
    name, why = chosen(auto)
    assert name == "SegmentDispatcher" and "no measurement for cpu in float32" in why


def test_the_users_own_table_goes_before_the_shipped_one() -> None:
    assert [each.path for each in measurements(None)] == [str(SHIPPED)]
    table(user_file(), (case(), FAST))
    assert [each.path for each in measurements(None)] == [str(user_file()), str(SHIPPED)]
    table(user_file(), (case(), {"SegmentDispatcher": 0.1, "GroupedDispatcher": 1.0}))
    assert chosen(AutoDispatcher())[0] == "SegmentDispatcher"


def test_the_shipped_table_says_where_it_comes_from() -> None:
    shipped = read_measured(SHIPPED, 0)
    assert shipped.source.keys() >= {"torch", "processor", "threads", "date", "command"}
    assert {row.case.device for row in shipped.rows} == {"cpu"}
    assert all(time > 0 for row in shipped.rows for time in row.milliseconds.values())


def test_a_choice_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    auto = AutoDispatcher(table(tmp_path / "t.json", (case(), FAST)))
    with caplog.at_level(logging.INFO, logger="lightning_moevlm.model.dispatch"):
        assert chosen(auto) == chosen(auto)
    assert len(caplog.records) == 1


def test_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="moevlm bench dispatch"):
        AutoDispatcher(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text(json.dumps({"rows": [{"case": {}}]}))
    with pytest.raises(UserError, match="is no table of dispatcher measurements"):
        AutoDispatcher(str(tmp_path / "bad.json"))


def test_rows_are_rounded_so_that_similar_batches_are_one_case() -> None:
    # 1000 / 8 = 125, 2^7 = 128; 3 / 8 and 0 are one row
    assert [rounded_rows(pairs, 8) for pairs in (1000, 3, 0)] == [128, 1, 1]


def test_auto_gives_what_the_loop_gives(tmp_path: Path) -> None:
    experts = MLPExperts(16, 4, 32)
    initialise(experts, seed=0, std=0.3)
    tokens_TD = routing_input(64, 16).tokens_TD
    logits_TE = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    for plan in (top_1_plan(logits_TE), limited(top_1_plan(logits_TE), 0.5)):
        auto = AutoDispatcher(table(tmp_path / "t.json", (case(), FAST)))
        torch.testing.assert_close(auto(plan, tokens_TD, experts), LoopDispatcher()(plan, tokens_TD, experts))
